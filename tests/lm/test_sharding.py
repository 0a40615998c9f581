"""An LM of which each process holds a part: the heads are those of a run in which each holds all of it."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import command_words, forbid_loading, run_together, tiny_gpt2, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sae_accel.train as train
from sae_accel.activations.running_lm import RunningLM
from sae_accel.common.errors import InputError
from sae_accel.lm.hooks import Site
from sae_accel.lm.load import load_lm
from sae_accel.lm.sharding import shard
from sae_accel.recipe.arguments import ModelArguments


SHARD = {"model.shard": "true"}
# The deepest lies inside a layer, or is one.
HOOKPOINTS = {"stream": ["layers.0", "layers.2.mlp"], "text": ["layers.1.mlp", "layers.1.self_attn", "layers.2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, place):
    """What the runs read and where they write: rows in files of unequal length, an adapter, an LM without weights."""
    folder = tmp_path_factory.mktemp("sharded")
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("a", 18), ("b", 6)):
        ids = torch.randint(0, 99, (rows, 16), generator=generator).tolist()
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    config = LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(place / "lm"), config).save_pretrained(folder / "adapter")
    shutil.copytree(place / "lm", folder / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def runs(place, folder):
    """By name, runs on two processes; those named `sharded_...` differ from others in `model.shard` alone."""
    batches = {"training.per_device_train_batch_size": 2}
    # The second process has read its file when the first has read a third of its own.
    stream = batches | {"data.path": folder / "*.jsonl", "data.streaming": "true", "data.shuffle_seed": "null"}
    stream |= {"data.eval_examples": 0, "training.max_steps": 9}
    # Two held-out rows fill a batch of the first process, and leave none to the second.
    text = batches | {"data.eval_examples": 2}
    modules = {"training.distribute_modules": "true"}
    changes = {
        "stream": stream,
        "stream_modules": stream | modules,
        "text": text,
        "text_modules": text | modules,
        "text_latents": text | {"training.distribute_latents": "true"},
        "fsdp": text | {"training.optim": "adam"},
        "adapter": text | {"model.adapter": folder / "adapter", "model.dtype": "bfloat16"},
    }
    changes |= {f"sharded_{name}": SHARD | values for name, values in changes.items()}
    changes["empty"] = SHARD | {"model.name_or_path": folder / "empty"}
    made = {name: {"words": command_words(place, folder / name, **values)} for name, values in changes.items()}
    for name, one in made.items():
        one["words"] += ["--heads.hookpoints", *(HOOKPOINTS["stream" if "stream" in name else "text"])]
        if "fsdp" in name:
            one["environment"] = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return run_together(2, made, folder)[0]


NAMES = ["stream", "stream_modules", "text", "text_modules", "text_latents", "fsdp", "adapter"]


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_metrics_are_those_of_an_lm_that_is_whole(runs, folder, name):
    whole, sharded = folder / name / "run", folder / f"sharded_{name}" / "run"
    files = sorted(path.relative_to(whole) for path in whole.glob("layers.*/*.safetensors"))
    assert len(files) == (2 if name.startswith("stream") else 3)
    for file in files:
        assert (whole / file).read_bytes() == (sharded / file).read_bytes()
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (whole, sharded))
    del first["train/tokens_per_second"], second["train/tokens_per_second"]
    assert first == second
    assert name.startswith("stream") or first["eval/tokens"] == 2 * 16


@pytest.mark.parametrize("name", NAMES)
def test_after_a_run_each_process_holds_half_of_the_layers(runs, name):
    whole = runs[name][0]["lm_parameters"]
    for process in runs[f"sharded_{name}"]:
        # A layer that was left gathered would weigh 3,984 more; the embedding's 101 rows do not halve.
        assert abs(process["lm_parameters"] - whole / 2) <= 24


def test_an_lm_that_one_process_cannot_read_is_refused_on_all(runs):
    first, second = (process["refused"] for process in runs["empty"])
    assert first == second and "cannot be loaded" in first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "model.shard: there is one process"),
        ({"training.loss": "ce"}, "model.shard: with loss ce or kl"),
        ({"training.loss": "kl", "lora.train_heads": "true"}, "model.shard: with loss ce or kl, and so with a lora"),
        ({"model.quantization": "8bit"}, "model.shard: quantised weights cannot be cut"),
        ({"model.device_map": "auto"}, "and model.device_map whole modules"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_loaded(
    place, tmp_path, capsys, monkeypatch, changes, message
):
    forbid_loading(monkeypatch)
    assert train.main(command_words(place, tmp_path, **SHARD, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_one_process_alone_is_refused_where_an_lm_is_loaded(place):
    with pytest.raises(InputError, match="there is one process"):
        load_lm(ModelArguments(name_or_path=str(place / "lm"), shard=True))


@pytest.fixture
def mesh():
    """Of one process, for what does not depend on how many there are."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _tied():
    config = tiny_llama().config.to_dict() | {"tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**config))


@pytest.mark.parametrize(
    ("make", "layers", "inside"),
    [(tiny_llama, "layers", "mlp"), (tiny_gpt2, "h", "mlp.act"), (_tied, "layers", "self_attn.o_proj")],
)
def test_a_pass_that_stops_early_leaves_nothing_behind(mesh, make, layers, inside):
    torch.manual_seed(0)
    lm = make().requires_grad_(False)
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    last = Site(f"{layers}.2", "output")
    site_lists = [[Site(f"{layers}.1.{inside}", side), Site(f"{layers}.0", "input")] for side in ("input", "output")]
    expected = [RunningLM(lm, sites, [])(batch).by_site for sites in ([last], *site_lists)]
    embedding = lm.get_input_embeddings()
    sharded = shard(lm, mesh)
    assert isinstance(embedding, FSDPModule) == (embedding.weight is not lm.get_output_embeddings().weight)
    cut = [module for module in sharded.modules() if isinstance(module, FSDPModule)]
    for sites, whole in [*zip(([last], *site_lists), expected, strict=True)] * 2:
        found = RunningLM(sharded, sites, [])(batch).by_site
        assert all(torch.equal(found[site], whole[site]) for site in sites)
        assert all(isinstance(parameter, DTensor) for module in cut for parameter in module.parameters())
    for module in cut:
        # What is remembered for backward passes would grow with every batch.
        assert not module._get_fsdp_state()._comm_ctx.post_forward_order

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hub_server import HubServer
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny import (
    Course,
    assert_equal,
    command_words,
    forbid_loading,
    tiny_gpt2,
    tiny_llama,
    tiny_tokens,
    tiny_trainer,
    trained_llama,
    weights,
    whole_and_resumed,
)
from torch.func import functional_call

import sae_accel.train as train
from sae_accel.bank.plans import plan_heads
from sae_accel.common.errors import InputError
from sae_accel.lm.load import load_architecture, load_lm
from sae_accel.lm.modules import hookpoint_names
from sae_accel.lm.splice import splice
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel
from sae_accel.recipe.arguments import HeadArguments, LoraArguments, ModelArguments
from sae_accel.training.lora import lora_targets


HEAD = HeadArguments(hookpoints="layers.1", k=4, expansion_factor=2)


def _save_adapter(lm, folder, **options):
    """An adapter that changes what the LM does."""
    torch.manual_seed(1)
    config = LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 4, "task_type": "CAUSAL_LM"} | options)
    adapted = get_peft_model(lm, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return adapted.eval()


def _ids():
    return torch.tensor(tiny_tokens(4)["input_ids"])


@pytest.mark.parametrize("base", [False, True])
def test_an_adapter_changes_activations_and_no_name(place, tmp_path, base):
    lm = tiny_llama().base_model if base else tiny_llama()
    plain = hookpoint_names(tiny_llama().base_model)
    options = {"task_type": "FEATURE_EXTRACTION"} if base else {}
    adapted = _save_adapter(lm, tmp_path / "adapter", **options)
    arguments = ModelArguments(name_or_path=str(place / "lm"), adapter=str(tmp_path / "adapter"))
    found = load_lm(arguments).base_model
    assert hookpoint_names(found) == plain == hookpoint_names(load_architecture(arguments).base_model)
    with torch.no_grad():
        expected = adapted(_ids(), output_hidden_states=True).hidden_states
        hidden = found(_ids(), output_hidden_states=True).hidden_states
        clean = tiny_llama().base_model(_ids(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[2], expected[2])
    assert not torch.allclose(hidden[2], clean[2], atol=1e-2)
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_heads_train_on_an_lm_with_an_adapter(place, tmp_path):
    _save_adapter(tiny_llama(), tmp_path / "adapter")
    words = command_words(
        place, tmp_path, **{"model.adapter": tmp_path / "adapter", "heads.hookpoints": "layers.1.mlp.*"}
    )
    assert train.main(words) == 0
    names = ["layers.1.mlp.act_fn", "layers.1.mlp.down_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"]
    assert sorted(AutoSae.from_pretrained(tmp_path / "run")) == names


def test_a_peft_model_is_taken_as_the_lm_that_it_is(tmp_path):
    adapted = _save_adapter(tiny_llama(), tmp_path / "adapter")
    trainer = tiny_trainer(tmp_path / "run", [HEAD], lm=adapted, max_steps=1)
    ids = _ids()
    (site,) = trainer.bank.plans["layers.1"].reads
    found = trainer.activations({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).by_site[site]
    with torch.no_grad():
        expected = adapted(ids, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "There is no folder"),
        (lambda folder: tiny_llama().save_pretrained(folder), "it has no adapter_config.json"),
        (
            lambda folder: get_peft_model(
                tiny_llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            ).save_pretrained(folder),
            "changes the LM's input and not its modules",
        ),
        (lambda folder: _save_adapter(tiny_llama(layers=5), folder), "does not fit"),
        (
            lambda folder: _save_adapter(tiny_gpt2(), folder, target_modules=["c_attn"], fan_in_fan_out=True),
            "cannot be loaded",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(
    place, tmp_path, capsys, monkeypatch, make, message
):
    make(tmp_path / "adapter")
    forbid_loading(monkeypatch)
    assert train.main(command_words(place, tmp_path, **{"model.adapter": tmp_path / "adapter"})) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("sae_accel: model.adapter: ") and message in error


def test_an_adapter_and_heads_to_start_from_come_from_the_hub(place, tmp_path):
    _save_adapter(tiny_llama(), tmp_path / "hub" / "user" / "adapter")
    head = SaeModel(SaeConfig(d_in=24, num_latents=96, k=4, hookpoint="layers.1"))
    head.save_pretrained(tmp_path / "hub" / "user" / "saes" / "layers.1")
    changes = {"model.adapter": "user/adapter", "training.init_from": "user/saes", "heads.hookpoints": "layers.1"}
    command = [sys.executable, "-m", "sae_accel.train", *command_words(place, tmp_path, **changes)]
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    root = str(Path(__file__).parents[2])
    with HubServer(tmp_path / "hub") as hub:
        fixed = {
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": root,
        }
        done = subprocess.run(command, env=kept | fixed, capture_output=True, text=True)
        fetched = {line.split("/resolve/")[-1].split("/", 1)[-1] for line in hub.requests}
    assert done.returncode == 0, done.stderr
    assert "Heads start from user/saes:" in done.stdout
    assert {"adapter_config.json", "adapter_model.safetensors", "layers.1/model.safetensors"} <= fetched


def _lora_run(tmp_path, lora, init_from=None, **options):
    lm, rows = trained_llama()
    arguments = dict(loss="kl", max_steps=30, optim="adam", learning_rate=1e-3, eval_steps=10, save_best=True)
    trainer = tiny_trainer(
        tmp_path,
        [HEAD],
        lm=lm,
        train=rows.select(range(8, 64)),
        held_out=rows.select(range(8)),
        lora=lora,
        init_from=init_from,
        **(arguments | options),
    )
    return lm, rows, trainer


@pytest.fixture
def trained_heads(tmp_path):
    """Heads of the LM that the LoRA tests use, good enough to be worth adapting to."""
    lm, rows = trained_llama()
    trainer = tiny_trainer(
        tmp_path / "heads", [HEAD], lm=lm, train=rows, max_steps=30, optim="adam", learning_rate=1e-2
    )
    trainer.train()
    return str(tmp_path / "heads")


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_lora_lowers_the_spliced_loss_around_frozen_heads(tmp_path, trained_heads, loss):
    lora = LoraArguments(rank=4, learning_rate=1e-2)
    lm, rows, trainer = _lora_run(tmp_path / "run", lora, trained_heads, loss=loss)
    metrics = trainer.train().metrics
    assert metrics["eval/ce"] < metrics["initial/ce"] and metrics[f"eval/{loss}"] < metrics[f"initial/{loss}"]
    # The clean LM is the one without the LoRA, before and after.
    assert metrics["eval/ce_clean"] == pytest.approx(metrics["initial/ce_clean"], rel=1e-6)
    before, after = (AutoSae.from_pretrained(folder).state_dict() for folder in (trained_heads, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_lora_is_saved_as_peft_alone_reads_it(tmp_path, trained_heads):
    lora = LoraArguments(rank=4, alpha=12.0, learning_rate=1e-2, target_modules="layers.[23].mlp.*_proj")
    lm, rows, trainer = _lora_run(tmp_path / "run", lora, trained_heads)
    metrics = trainer.train().metrics
    plain, _ = trained_llama()
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 12.0, "CAUSAL_LM")
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 12 and all("layers.2.mlp" in name or "layers.3.mlp" in name for name in tensors)
    head = AutoSae.from_pretrained(tmp_path / "run")
    ids = torch.tensor(rows[:8]["input_ids"])
    adapted = PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    with torch.no_grad(), splice(adapted.get_base_model(), head):
        assert adapted(ids, labels=ids).loss.item() == pytest.approx(metrics["eval/ce"], rel=1e-4)
    # The heads of the run read as ever, and the best set has its adapter too.
    assert head.config.hookpoint == "layers.1"
    assert (tmp_path / "run" / "best" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "checkpoint-30" / "adapter" / "adapter_config.json").exists()


def _plain_loss(loss, lm, adapted, scale, head, rows, fvu_weight):
    """The loss of an LM with a LoRA's products added to those of its layers, and a head spliced in, by hooks alone."""
    with torch.no_grad():
        clean = lm(rows).logits.log_softmax(-1)
    own = []

    def exchange(module, args, output):
        new = head(output).reconstruction
        own.append((new - output).pow(2).sum() / (output - output.mean((0, 1))).pow(2).sum())
        return new

    handles = [lm.model.layers[1].register_forward_hook(exchange)]
    for name, (a, b) in adapted.items():

        def add(module, args, output, a=a, b=b):
            return output + scale * args[0] @ a.T @ b.T

        handles.append(lm.get_submodule(name).register_forward_hook(add))
    log_probs = lm(rows).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    if loss == "ce":
        value = F.nll_loss(log_probs[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    else:
        value = F.kl_div(log_probs, clean, log_target=True, reduction="none").sum(-1).mean()
    return value + fvu_weight * own[0]


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_heads_and_a_lora_train_together_by_the_gradient_of_one_loss(tmp_path, trained_heads, loss):
    lora, course = LoraArguments(rank=2, alpha=12.0, train_heads=True, learning_rate=1e-3), Course()
    options = dict(loss=loss, max_steps=2, fvu_weight=0.1, warmup_steps=0, callbacks=[course])
    lm, rows, trainer = _lora_run(tmp_path / "run", lora, trained_heads, **options)
    trainer.train()
    places = {id(parameter): name for name, parameter in lm.named_parameters()}
    before = {name: value.requires_grad_() for name, value in course.weights[1].items()}
    adapted = {}
    for i, parameter in enumerate(trainer.bank.adapter):
        name, _, matrix = places[id(parameter)].partition(".lora_")
        adapted.setdefault(name, {})[matrix[0]] = before[f"adapter.{i}"]
    assert len(adapted) == 14
    adapted = {name: (matrices["A"], matrices["B"]) for name, matrices in adapted.items()}
    head = SaeModel(trainer.heads["layers.1"].config)
    heads = {name.removeprefix("heads.layers:1."): value for name, value in before.items() if name.startswith("heads")}
    plain, _ = trained_llama()
    second = torch.tensor(rows[12:16]["input_ids"])

    def spliced(tokens):
        return functional_call(head, heads, (tokens,))

    expected = _plain_loss(loss, plain.requires_grad_(False), adapted, 12.0 / 2, spliced, second, 0.1)
    for name, gradient in zip(before, torch.autograd.grad(expected, list(before.values())), strict=True):
        atol = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(course.gradients[1][name], gradient, rtol=1e-3, atol=atol)
    assert not any(torch.equal(course.weights[0][name], value) for name, value in course.weights[-1].items())
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 28 and all(tensor.abs().max() > 0 for tensor in saved.values())


@pytest.mark.parametrize("optim", ["signum", "muon"])
def test_a_killed_run_with_a_lora_resumes_bit_for_bit(tmp_path, trained_heads, optim):
    options = dict(max_steps=6, save_steps=2, optim=optim)
    lora = LoraArguments(rank=2)
    whole, resumed = whole_and_resumed(
        tmp_path, lambda folder, **more: _lora_run(folder, lora, trained_heads, **options, **more)[2]
    )
    assert len(whole.bank.adapter)
    assert_equal(weights(whole), weights(resumed))
    assert whole.run_state.best == resumed.run_state.best


def test_a_checkpoint_of_a_run_with_another_lora_is_refused(tmp_path, trained_heads):
    options = dict(max_steps=2, save_steps=1)
    _lora_run(tmp_path / "run", LoraArguments(rank=2), trained_heads, **options)[2].train()
    for other, message in (
        (LoraArguments(rank=2, train_heads=True), "it has lora.train_heads false, this run has true"),
        (LoraArguments(rank=3), "it has lora.rank 2, this run has 3"),
    ):
        _, _, trainer = _lora_run(tmp_path / "run", other, trained_heads, **options)
        with pytest.raises(InputError, match=message):
            trainer.train(resume_from_checkpoint=True)


def test_a_lora_trains_on_an_lm_in_4_bits(place, tmp_path):
    words = {"model.quantization": "4bit", "training.loss": "ce", "lora.train_heads": "true", "lora.rank": 2}
    assert train.main(command_words(place, tmp_path, **words)) == 0
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_gpt2_takes_a_lora_without_a_warning(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        [HeadArguments(hookpoints="h.0", k=4)],
        lm=tiny_gpt2(),
        lora=LoraArguments(train_heads=True),
        loss="ce",
        max_steps=2,
    )
    trainer.train()
    adapted = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "adapter")
    assert "transformer.h.1.attn.c_attn" in adapted.base_model.targeted_module_names


def test_without_targets_every_linear_layer_behind_the_first_head_is_adapted():
    lm = tiny_llama()
    entries = [HeadArguments(hookpoints=["layers.2", "layers.1.mlp"], k=4)]
    targets = lora_targets(lm.base_model, plan_heads(lm, entries), LoraArguments())
    assert {name.split(".")[1] for name in targets} == {"2", "3"} and len(targets) == 14
    first = lora_targets(
        lm.base_model, plan_heads(lm, [HeadArguments(hookpoints="embed_tokens", k=4)]), LoraArguments()
    )
    assert len(first) == 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora.target_modules": "layers.*.mpl.*"},
            "lora.target_modules[0]: 'layers.*.mpl.*' matches no linear layer",
        ),
        ({"heads.hookpoints": "layers.3"}, "has no linear layer behind layer 3"),
        ({"training.loss": "fvu"}, "lora: it needs loss ce or kl"),
        ({"lora.train_heads": "false"}, "lora.train_heads: it is false, but the heads are new"),
        ({"model.adapter": "x"}, "lora: the LM carries model.adapter already"),
        ({"lora.rank": 0}, "lora.rank: found 0, the least allowed is 1"),
        ({"lora.r": 4}, "lora"),
    ],
)
def test_a_lora_that_cannot_be_trained_is_refused_before_weights_are_read(
    place, tmp_path, capsys, monkeypatch, changes, message
):
    forbid_loading(monkeypatch)
    words = {"training.loss": "kl", "lora.train_heads": "true", "lora.rank": 2} | changes
    assert train.main(command_words(place, tmp_path, **words)) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error


def test_frozen_heads_take_no_loss_of_their_own(tmp_path, trained_heads):
    with pytest.raises(InputError, match="fvu_weight: it trains heads, and lora.train_heads is false"):
        _lora_run(tmp_path, LoraArguments(), trained_heads, fvu_weight=1.0)

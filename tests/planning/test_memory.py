"""What a run is said to need of memory, against what it then uses."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import command_words, run_together
from transformers import LlamaConfig

from sae_accel.planning.launch import Launch
from sae_accel.planning.memory import plan_memory
from sae_accel.planning.peak_memory import PeakMemory
from sae_accel.recipe.arguments import SaeTrainingArguments
from sae_accel.recipe.recipe import Recipe, load_recipe
from sae_accel.train import main


# Heads beside which Python and its libraries do not take most.
LARGE = {
    "heads.num_latents": 500_000,
    "training.per_device_train_batch_size": 1,
    "training.micro_batches": 2,
    "training.max_steps": 2,
}
WAYS = {
    "": (1, {}, {}),
    "FSDP": (2, {}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    "distribute_latents": (2, {"training.distribute_latents": "true"}, {}),
}


def test_the_peak_is_that_of_the_tensors_that_live_at_one_time():
    with PeakMemory() as peak:

        def work():
            first = torch.zeros(1000)
            second = first.view(10, 100) + 1
            del first
            return second * second.sum()

        kept = []
        assert peak.of(lambda: kept.append(work())) == 2 * 4000 + 4
        assert peak.live == 4000
        kept.clear()
    assert peak.live == 0


def test_every_part_of_the_plan_is_what_the_sizes_say(llama3):
    recipe = llama3("llama3-all")
    plan = plan_memory(recipe, Launch(8, "distribute_modules"))
    head = 2 * 131072 * 4096 + 131072 + 4096
    assert [(one.parameters, one.gradients) for one in plan] == [(2 * 4 * head,) * 2] * 8
    # Signum holds one number a parameter, and what its average has counted.
    assert all(one.optimizer == pytest.approx(2 * 4 * head, rel=1e-4) for one in plan)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert all(one.lm == pytest.approx(linear + 2 * 128256 * 4096, rel=0.01) for one in plan)
    assert all(one.total < 48e9 for one in plan)
    assert sorted(name for one in plan for name in one.heads) == sorted(f"layers.{i}" for i in range(0, 32, 2))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_uses_what_it_was_said_to(place, tmp_path, way):
    processes, changes, environment = WAYS[way]
    words = command_words(place, tmp_path, **LARGE, **changes)
    shown = _command([*words, "--dry-run", str(processes)], environment)
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.splitlines() if re.match(r"\d+ +layers", line)]
    planned = [float(row[-1]) * 1e9 for row in rows]
    assert len(planned) == processes and not (tmp_path / "run").exists()
    found = run_together(processes, {"large": {"words": words}}, tmp_path, **environment)[0]["large"]
    assert [one["peak_memory"] for one in found] == pytest.approx(planned, rel=0.15)


def test_as_many_processes_are_planned_for_as_were_started_in_the_way_that_accelerate_was_told(monkeypatch):
    training = SaeTrainingArguments()
    assert Launch.of(training) == Launch(1, "")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Launch.of(training) == Launch(4, "DDP")
    assert Launch.of(SaeTrainingArguments(distribute_latents=True), 2) == Launch(2, "distribute_latents")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert Launch.of(training) == Launch(4, "FSDP", bf16=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert Launch.of(training) == Launch(4, "ZeRO-3", bf16=True)


def test_parts_are_smaller_the_more_processes_share_them(place):
    recipe = Recipe.from_dict(_tiny(place))
    whole = plan_memory(recipe, Launch(1, ""))[0]
    for way in ("FSDP", "ZeRO-3", "distribute_latents"):
        for one in plan_memory(recipe, Launch(4, way)):
            assert one.parameters == pytest.approx(whole.parameters / 4, rel=0.02)
            assert one.gradients == pytest.approx(whole.gradients / 4, rel=0.02)
    assert {one.optimizer for one in plan_memory(recipe, Launch(4, "DDP"))} == {whole.optimizer}


def test_a_lora_and_spliced_heads_are_planned_for(place):
    lora = {"lora": {"rank": 2, "train_heads": True}}
    recipe = Recipe.from_dict(_tiny(place, loss="kl") | lora)
    one = plan_memory(recipe, Launch(1, ""))[0]
    without = plan_memory(Recipe.from_dict(_tiny(place, loss="kl")), Launch(1, ""))[0]
    # Of rank 2, on the four and three linear layers of each of the two layers behind the first head.
    added = 2 * 2 * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 40))
    assert one.parameters - without.parameters == one.gradients - without.gradients == 4 * added
    assert one.work > plan_memory(Recipe.from_dict(_tiny(place)), Launch(1, ""))[0].work


def test_the_lm_counts_in_its_own_precision_and_by_its_parts(llama3):
    def lm(**model):
        recipe = llama3("llama3", **model)
        # A head on an early layer, behind which the LM need not be rehearsed.
        recipe.heads = [replace(recipe.heads[0], layers=[0])]
        return plan_memory(recipe, Launch(8, "DDP"))[0].lm

    assert lm() == pytest.approx(2 * 7.505e9, rel=0.001)
    assert lm(quantization="4bit") < lm(quantization="8bit") < lm()
    layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    # Of the embedding, which is larger than a layer, two copies live as it is used.
    assert lm(shard=True) == pytest.approx((32 * layer + 2 * 128256 * 4096) / 8 + 4 * 128256 * 4096, rel=0.001)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run", "0"], "expected a number of processes"),
        (["--dry-run", "two"], "expected a number of processes"),
        (["--dry-run", "3", "--training.distribute_modules"], "there are 2 heads for 3 processes"),
        (["--dry-run", "--model.shard"], "model.shard: there is one process"),
        (["--dry-run", "--heads.hookpoints", "layers.9"], "matches no module"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(place, tmp_path, capsys, words, message):
    assert main([*command_words(place, tmp_path), *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out


def _tiny(place, **training):
    heads = [{"hookpoints": "layers.[12]", "k": 4, "num_latents": 4000}]
    model = {"name_or_path": str(place / "lm")}
    return {"model": model, "data": {"ctx_len": 16}, "heads": heads, "training": training}


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """Makes recipes on Llama 3 8B, of which nothing is there but its configuration."""
    folder = tmp_path_factory.mktemp("llama3")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)

    def make(recipe, **model):
        overrides = [(f"model.{key}", value) for key, value in (model | {"name_or_path": str(folder)}).items()]
        return load_recipe(f"recipes/{recipe}.yaml", overrides)

    return make


def _command(words, environment):
    return subprocess.run(
        [sys.executable, "-m", "sae_accel.train", *words],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )

"""What a run ends with tells of silent latents, of losses that have risen, and of what is no number."""

import json
import math
import re

import pytest
import torch
from tiny import command_words, tiny_tokens, tiny_trainer, whole_and_resumed

from sae_accel.recipe.arguments import HeadArguments
from sae_accel.runs.closing_message import closing_message, losses_table, metrics_table
from sae_accel.train import main


def cells(table: str) -> dict[str, dict[str, str]]:
    """By head, cells by their column."""
    title, _, *lines = (re.split(r"  +", line) for line in table.splitlines())
    return {line[0]: dict(zip(title, line, strict=True)) for line in lines}


def test_silent_latents_are_those_that_no_held_out_token_and_no_late_token_of_training_activates(tmp_path):
    # Far fewer tokens than make a latent dead, and 1 latent a token of 240.
    heads = [HeadArguments(hookpoints="layers.1", k=1, expansion_factor=10)]
    held_out = tiny_tokens(3, seed=5)
    trainer = tiny_trainer(tmp_path, heads, held_out=held_out, max_steps=12, logging_steps=4)
    trainer.train()
    silent = {}
    for when, data in (("eval", held_out), ("train", None)):
        if data is not None:
            with trainer.run_state.evaluated_weights(), torch.no_grad():
                ids = torch.tensor(data["input_ids"])
                batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                (rows,) = trainer.activations(batch).by_site.values()
                acts, indices = trainer.heads["layers.1"].encode(rows)
            silent[when] = 1 - len(set(indices[acts > 0].tolist())) / 240
            assert trainer.metrics["eval/silent/layers.1"] == pytest.approx(silent[when])
    entry = trainer.state.log_history[-1]
    # 256 tokens since the log before can activate no more latents than that.
    assert 0 < entry["train/silent/layers.1"] == trainer.metrics["train/silent/layers.1"] < 1
    assert entry["train/dead/layers.1"] == 0
    found = cells(metrics_table(trainer.heads, trainer.metrics))["layers.1"]
    assert found["silent"] == f"{silent['eval']:.1%}" != "0.0%"
    assert found["silent in training"] == f"{entry['train/silent/layers.1']:.1%}"
    assert "dead" not in found


def test_what_is_not_measured_or_not_finite_is_said_to_be_no_number(tmp_path):
    heads = tiny_trainer(tmp_path).heads
    values = {"eval/fvu/layers.1": math.nan, "eval/l0/layers.1": 4.0, "eval/silent/layers.1": math.inf}
    found = cells(metrics_table(heads, values))
    assert [found["layers.1"][name] for name in ("FVU", "L0", "silent")] == ["no number", "4.0", "no number"]
    assert set(list(found["layers.2"].values())[4:]) == {"no number"}
    losses = losses_table({"initial/ce": 2.0, "eval/ce": math.nan, "initial/kl": 1.0, "eval/kl": 0.5})
    assert "no number" in losses and "nan" not in losses


# A rate that rises all the way, from where FVU falls to where it rises.
RISING = {"training.optim": "adam", "training.learning_rate": 1.0, "training.lr_scheduler_type": "constant"}
RISING |= {"training.warmup_steps": 39}


def _last_words(place, folder, capsys, **changes) -> str:
    options = {
        "training.max_steps": 40,
        "training.logging_steps": 2,
        "data.ctx_len": 8,
        "heads.hookpoints": "layers.1",
    }
    assert main(command_words(place, folder, **options | changes)) == 0
    return capsys.readouterr().out


def test_a_loss_that_has_risen_is_told_with_its_best_and_the_step_of_that(place, tmp_path, capsys):
    out = _last_words(place, tmp_path, capsys, **RISING, **{"training.eval_steps": 4, "training.save_best": "true"})
    (line,) = re.findall(r"^FVU of layers\.1 on held-out text has risen: .*$", out, re.MULTILINE)
    best, step, now = re.search(r"the best was ([0-9.]+) at step ([0-9,]+), now it is ([0-9.]+)\. ", line).groups()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert float(now) == pytest.approx(metrics["eval/fvu/layers.1"], abs=1e-4)
    assert float(now) > float(best)
    assert int(step) % 4 == 0 and 0 < int(step) < 40
    assert "save_best" in line and "lower" in line


def test_without_evaluations_the_training_loss_tells(place, tmp_path, capsys):
    out = _last_words(place, tmp_path, capsys, **RISING)
    (line,) = re.findall(r"^FVU of layers\.1 on training text has risen: .*$", out, re.MULTILINE)
    log = (tmp_path / "run" / "log_history.jsonl").read_text().splitlines()
    entries = [json.loads(entry) for entry in log]
    best = min(entries, key=lambda entry: entry["train/fvu/layers.1"])
    assert f"{best['train/fvu/layers.1']:.4f} at step {best['step']}" in line


def test_a_loss_that_falls_is_not_told(place, tmp_path, capsys):
    out = _last_words(place, tmp_path, capsys, **{"training.eval_steps": 4, "training.learning_rate": 1e-3})
    assert "has risen" not in out


def test_a_run_that_is_resumed_knows_how_low_it_has_been(tmp_path):
    whole, resumed = whole_and_resumed(
        tmp_path,
        lambda folder, **kwargs: tiny_trainer(
            folder, held_out=tiny_tokens(8, seed=5), max_steps=8, save_steps=4, eval_steps=2, logging_steps=2, **kwargs
        ),
    )
    assert resumed.run_state.lowest.lowest == whole.run_state.lowest.lowest
    assert len(whole.run_state.lowest.lowest) == 4


def test_the_message_ends_with_what_went_wrong(tmp_path):
    trainer = tiny_trainer(tmp_path)
    metrics = {"train/tokens": 1, "train/tokens_per_second": 1.0}
    assert "\nIt rose.\n" in closing_message("run", trainer.heads, metrics, warnings=["It rose."])

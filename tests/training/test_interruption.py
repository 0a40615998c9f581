"""Signals at every moment of a run, each to a run of its own."""

import json
import os
import signal
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from signalled import at, lines_of_ours, run, send
from tiny import command_words

from sae_accel import push


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
NOTHING = "Nothing was saved yet: start again with the same command."
GO_ON = "To go on, set --training.resume_from_checkpoint true."
RESUME = ["--training.resume_from_checkpoint", "true"]
STEPS = {
    "training.max_steps": 5,
    "training.save_steps": 2,
    "training.eval_steps": 2,
    "training.save_best": "true",
    # A rate that rises so far that heads become worse, and the best are those of the first evaluation.
    "training.optim": "adam",
    "training.learning_rate": 0.1,
    "training.warmup_steps": 4,
    "training.gradient_accumulation_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.logging_steps": 1,
}
LONG = 60.0
OBJECTIVE = "training.local_objective"
STEP, EVALUATION, SAVE = (
    "training.trainer:SaeTrainer.training_step",
    f"{OBJECTIVE}:LocalObjective.evaluate",
    "training.run_state:RunState._write_parts",
)
# By name: what is called when the signal comes, for which time, for how long it then would go on, and what is said.
MOMENTS = {
    "tokenisation": ("training.run:load_tokens", 1, LONG, f"by {{}}. {NOTHING}"),
    "loading": ("training.run:load_lm", 1, LONG, f"by {{}}. {NOTHING}"),
    "start": ("training.begin:start_heads", 1, LONG, f"by {{}}. {NOTHING}"),
    "step": (STEP, 2, 0, f"after step 1. Saved run/checkpoint-1. {GO_ON}"),
    "last batch": (f"{OBJECTIVE}:step_result", 1, 0, f"after step 1. Saved run/checkpoint-1. {GO_ON}"),
    "first batch": (f"{OBJECTIVE}:merge_moments", 9, 0, f"after step 2. Saved run/checkpoint-2. {GO_ON}"),
    "evaluation": (EVALUATION, 1, 0, f"after step 2. Saved run/checkpoint-2. {GO_ON}"),
    "save": (SAVE, 1, 0, f"after step 2. Saved run/checkpoint-2. {GO_ON}"),
    "last evaluation": (EVALUATION, 3, 0, f"after step 5. Saved run/checkpoint-5. {GO_ON}"),
    "last save": (
        "training.trainer:SaeTrainer.save_model",
        1,
        LONG,
        f"by {{}}. The newest complete checkpoint is run/checkpoint-5. {GO_ON}",
    ),
    "card": (
        "training.run_state:write_card",
        1,
        LONG,
        f"by {{}}. The heads are saved in run, but not their model card. {GO_ON}",
    ),
}


def _words(place, folder, **changes) -> list[str]:
    return command_words(place, folder, **STEPS | changes)


def _said(said: str, folder: Path) -> list[str]:
    """What a run says of itself, with the names of its folder short; and nothing else but its progress."""
    lines = [line for line in said.splitlines() if not line.startswith("step ")]
    assert "Traceback" not in said and "ignored" not in said, said
    return [line.replace(f"{folder}/", "") for line in lines if line.startswith("sae_accel:")]


def _heads(folder: Path) -> dict[str, torch.Tensor]:
    files = [file for file in sorted((folder / "run").rglob("model.safetensors")) if "checkpoint" not in str(file)]
    return {f"{file.relative_to(folder)} {name}": t for file in files for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What a run leaves that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(_words(place, folder), folder)[0] == 0
    return _heads(folder)


@pytest.mark.parametrize(("name", "number"), list(zip(MOMENTS, cycle([INT, TERM, HUP]), strict=False)))
def test_a_signal_ends_a_run_with_one_true_line_and_it_goes_on_to_the_same_end(place, tmp_path, whole, name, number):
    moment, call, wait, says = MOMENTS[name]
    words = _words(place, tmp_path)
    status, said = run(words, tmp_path, at(moment, lambda: send(number, wait=wait), call))
    assert status == 128 + number
    assert _said(said, tmp_path) == [f"sae_accel: Stopped {says.format(number.name)}"]
    assert not (tmp_path / "run" / ".lock").exists()
    status, said = run(words if NOTHING in says else words + RESUME, tmp_path)
    assert status == 0, said
    found = _heads(tmp_path)
    assert found.keys() == whole.keys() and len(found) == 16
    assert all(torch.equal(found[key], whole[key]) for key in found)


@pytest.mark.parametrize(
    ("numbers", "call", "says"),
    [
        ((INT, INT), 1, "by SIGINT. There is no checkpoint yet, but the best heads so far are in run/best."),
        ((HUP, INT), 2, f"by SIGHUP. The newest complete checkpoint is run/checkpoint-2. {GO_ON}"),
        ((TERM, TERM, HUP), 2, f"after step 4. Saved run/checkpoint-4. {GO_ON}"),
    ],
)
def test_a_second_ctrl_c_ends_a_save_at_once_and_a_second_sigterm_does_not(place, tmp_path, numbers, call, says):
    wait = LONG if INT in numbers else 0
    status, said = run(_words(place, tmp_path), tmp_path, at(SAVE, lambda: send(*numbers, wait=wait), call))
    assert status == 128 + numbers[0]
    (line,) = _said(said, tmp_path)
    assert line.startswith(f"sae_accel: Stopped {says}")


def test_a_run_that_was_stopped_before_it_saved_anything_starts_again_with_the_same_command(place, tmp_path):
    # It has begun to log by then.
    words = _words(place, tmp_path, **{"training.loss": "ce", "training.report_to": "tensorboard"})
    measure = "training.trainer:SaeTrainer._measure_start"
    status, said = run(words, tmp_path, at(measure, lambda: send(TERM, wait=LONG)))
    assert (status, _said(said, tmp_path)) == (143, [f"sae_accel: Stopped by SIGTERM. {NOTHING}"])
    assert (tmp_path / "run" / "logs").exists()
    assert run(words, tmp_path)[0] == 0


def test_a_window_of_the_lms_own_loss_is_left_between_its_batches(place, tmp_path):
    words = _words(
        place, tmp_path, **{"training.loss": "ce", "training.eval_steps": "null", "training.save_best": "false"}
    )
    batch = "training.end_to_end_objective:EndToEndObjective._losses"
    # Four held-out batches and two of the first step come before.
    status, said = run(words, tmp_path, at(batch, lambda: send(TERM), 7))
    assert status == 143
    assert _said(said, tmp_path) == [f"sae_accel: Stopped after step 1. Saved run/checkpoint-1. {GO_ON}"]


def test_a_run_whose_reader_has_gone_saves_and_ends(place, tmp_path):
    def closed() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        os.close(writer)
        os.close(reader)

    status, said = run(_words(place, tmp_path), tmp_path, closed)
    assert status == 141 and not said
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] < 5


def test_a_push_that_is_stopped_tells_what_is_saved_and_what_goes_on(place, tmp_path):
    words = _words(place, tmp_path, **{"training.push_to_hub": "true", "training.hub_model_id": "user/saes"})
    stop = at("hub.publisher:Release", lambda: send(TERM, wait=LONG))

    def before() -> None:
        import sae_accel.hub.publisher
        import sae_accel.training.run

        sae_accel.training.run._open_repo = lambda training: None
        sae_accel.hub.publisher.open_repo = lambda name, private: name
        sae_accel.hub.publisher.Publisher._begin = lambda self, step: None
        stop()

    status, said = run(words, tmp_path, before)
    by_hand = "To go on: python -m sae_accel.push run user/saes"
    assert (status, _said(said, tmp_path)) == (
        143,
        [f"sae_accel: Stopped by SIGTERM. Everything is saved in run, but the push was stopped. {by_hand}"],
    )
    status, said = run(
        [str(tmp_path / "run"), "user/saes"],
        tmp_path,
        at("hub.release:Release.push", lambda: send(HUP, wait=LONG)),
        push.main,
    )
    assert status == 129
    assert lines_of_ours(said) == [
        "sae_accel: Stopped by SIGHUP. Push again to go on: no file that has arrived is sent twice."
    ]

"""What is not finite on one of several processes is left out, or ends the run, alike on all."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import command_words, run_together, tiny_llama, tiny_tokens
from transformers import AutoTokenizer
from ways import WAYS

from sae_accel.train import main


# ZeRO 1 does what ZeRO 2 does.
# The three stages of ZeRO look at gradients alike; the last has the most in pieces.
SEVERAL = [way for way in WAYS if way not in ("zero1", "zero2")]
BAD, STEPS, BATCH = 100, 6, 4
HEADS = ["layers.1", "layers.2"]


@pytest.fixture(scope="module")
def data(place, tmp_path_factory):
    """An LM that makes NaN of a sequence with token `BAD`, and sequences; some have it."""
    folder = tmp_path_factory.mktemp("bad")
    lm = tiny_llama()
    lm.model.embed_tokens.weight.data[BAD] = math.nan
    lm.save_pretrained(folder / "lm")
    AutoTokenizer.from_pretrained(place / "lm").save_pretrained(folder / "lm")
    rows = torch.tensor(tiny_tokens(80)["input_ids"]).clamp_max(BAD - 1)
    # The last sequence of the second batch is the last process's; the fourth batch has one on each.
    for name, bad in (("some", [7, 12, 15]), ("nearly all", [i for i in range(80) if i % 4 == 3])):
        ids = rows.clone()
        ids[bad, 0] = BAD
        lines = [json.dumps({"input_ids": row}) for row in ids.tolist()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def _words(data, folder, processes, rows="some", **changes):
    values = {
        "model.name_or_path": data / "lm",
        "data.path": data / f"{rows}.jsonl",
        "data.eval_examples": 0,
        "data.shuffle_seed": "null",
        "training.per_device_train_batch_size": BATCH // processes,
        "training.max_steps": STEPS,
        "training.optim": "adam",
        "training.learning_rate": 1e-3,
        "training.lr_scheduler_type": "constant",
        "training.max_non_finite": 0.3,
        "training.save_steps": 2,
    }
    return command_words(data, folder, **values | changes)


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """What each process found, by way, and the folders of these runs; and that of one process alone."""
    folder = tmp_path_factory.mktemp("together")
    alone = {"training.output_dir": folder / "alone"}
    assert main(_words(data, folder, 1, **alone)) == 0
    runs = {}
    for way in SEVERAL:
        _, changes, environment = WAYS[way]
        words = _words(data, folder, 2, **changes, **{"training.output_dir": folder / way})
        runs[way] = {"words": words, "environment": environment}
    for way in ("ddp", "modules"):
        changes = {"training.output_dir": folder / f"{way} ends", "training.max_steps": 20}
        words = _words(data, folder, 2, "nearly all", **WAYS[way][1], **changes, **{"training.max_non_finite": 0.2})
        runs[f"{way} ends"] = {"words": words}
    return *run_together(2, runs, folder), folder


@pytest.mark.parametrize("way", SEVERAL)
def test_a_token_on_one_process_is_left_out_and_a_step_passed_over_as_on_one_process(found, way):
    everyone, _, folder = found
    assert all(one["spread"] == WAYS[way][0] for one in everyone[way])
    assert all(one["skips"] == {"steps": 1, "in_a_row": 0, "non_finite_tokens": 48} for one in everyone[way])
    assert all(one["tokens"] == (STEPS - 1) * BATCH * 16 - 16 for one in everyone[way])
    for head in HEADS:
        here, there = (load_file(folder / run / head / "model.safetensors") for run in (way, "alone"))
        for name, weight in there.items():
            torch.testing.assert_close(here[name], weight, rtol=1e-3, atol=1e-4, msg=f"{head} {name}")


@pytest.mark.parametrize("way", ["ddp", "modules"])
def test_ten_steps_passed_over_end_every_process_with_one_message(found, way):
    everyone, errors, folder = found
    first, second = (one["refused"] for one in everyone[f"{way} ends"])
    assert first == second
    assert first.startswith("Step 10: 10 optimizer steps in a row were skipped. The last one: 25.0% of its tokens")
    assert "layers.1" in first
    assert not list((folder / f"{way} ends").glob("layers.*"))
    assert errors.count("Step 1 is skipped") == 2

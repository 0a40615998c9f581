"""What several processes owe each other, on processes that are started as users start them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import command_words, run_together, torchrun, torchrun_command

from sae_accel.loading.auto import AutoSae
from sae_accel.train import main


TRAIN = ["-m", "sae_accel.train"]


def test_two_processes_train_heads_and_a_lora_end_to_end_as_one_does(place, tmp_path):
    words = {
        "training.loss": "kl",
        "training.fvu_weight": 0.5,
        "training.optim": "adam",
        "training.warmup_steps": 0,
        "lora.train_heads": "true",
        "lora.rank": 2,
    }
    one = command_words(place, tmp_path / "one", **words, **{"training.per_device_train_batch_size": 4})
    two = command_words(place, tmp_path / "two", **words, **{"training.per_device_train_batch_size": 2})
    assert main(one) == 0
    done = torchrun(2, [*TRAIN, *two], tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    # One table, from the main process, and one tokenisation, for which the other waited.
    assert done.stdout.count("Saved in") == 1
    assert done.stderr.count("Tokenizing: 100%") == 1
    assert done.stderr.count("wait for the data to be tokenised") == 1
    first, second = (AutoSae.from_pretrained(tmp_path / name / "run") for name in ("one", "two"))
    assert list(first) == list(second) == ["layers.1", "layers.2"]
    for name in first:
        for a, b in zip(first[name].parameters(), second[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    adapters = [
        load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in ("one", "two")
    ]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Tokenised rows in two files, of which the first has three times as many."""
    folder = tmp_path_factory.mktemp("uneven")
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("a", 18), ("b", 6)):
        ids = torch.randint(0, 99, (rows, 16), generator=generator).tolist()
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    return folder


@pytest.fixture(scope="module")
def runs(place, uneven, tmp_path_factory):
    """On two processes: data that ends unevenly, and what is to be refused."""
    folder = tmp_path_factory.mktemp("runs")
    stream = {"data.path": uneven / "*.jsonl", "data.streaming": "true", "data.eval_examples": 0}
    stream |= {"data.shuffle_seed": "null", "training.per_device_train_batch_size": 2, "training.max_steps": 9}
    made = {
        "local": stream,
        "modules": stream | {"training.distribute_modules": "true"},
        "kl": stream | {"training.loss": "kl"},
        "held_out": {"data.eval_examples": 3, "training.per_device_train_batch_size": 2},
        "other_recipes": {"training.seed": "{process}"},
        "too_few_heads": {"heads.hookpoints": "layers.1", "training.distribute_modules": "true"},
        "muon": {"training.distribute_latents": "true", "training.optim": "muon"},
        "missing": {"data.path": folder / "missing-{process}.jsonl"},
        "bad_row": stream | {"data.path": folder / "*.jsonl"},
    }
    made = {name: {"words": command_words(place, folder / name, **changes)} for name, changes in made.items()}
    # One process alone comes upon it.
    for name, ids in (("a", [[1] * 16] * 6), ("b", [[1] * 16, [5000] * 16])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in ids))
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    made["two_ways"] = {
        "words": command_words(place, folder / "two_ways", **{"training.distribute_modules": "true"}),
        "environment": fsdp,
    }
    made["old_fsdp"] = {"words": command_words(place, folder / "old"), "environment": fsdp | {"FSDP_VERSION": "1"}}
    return folder, run_together(2, made, folder)[0]


@pytest.mark.parametrize("name", ["local", "modules", "kl"])
def test_a_stream_that_ends_unevenly_neither_hangs_nor_loses_a_batch(runs, name):
    # Each process reads one file; the one with less goes on with batches of nothing. 9 and 3 batches of 2 x 16 tokens.
    assert [one["tokens"] for one in runs[1][name]] == [24 * 16] * 2


def test_held_out_sequences_that_do_not_fill_a_batch_on_each_process_are_measured(runs):
    metrics = json.loads((runs[0] / "held_out" / "run" / "metrics.json").read_text())
    assert metrics["eval/tokens"] == 3 * 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_recipes", "training.seed: process 0 has 0, but process 1 has 1"),
        ("too_few_heads", "there are 1 heads for 2 processes"),
        ("muon", "muon works on whole matrices"),
        ("missing", "missing-0.jsonl"),
        ("bad_row", "input_ids go from 5000 to 5000, but the LM knows"),
        ("two_ways", "asks for FSDP"),
        ("old_fsdp", "fsdp_version: 2"),
    ],
)
def test_what_cannot_be_is_refused_on_all_processes_with_one_message(runs, name, message):
    first, second = (one["refused"] for one in runs[1][name])
    if name != "missing":
        assert first == second
    assert message in first
    assert not (runs[0] / name / "run").exists()


def test_accelerate_launch_of_two_processes_on_a_cpu_does_not_train_one_in_silence(place, tmp_path):
    accelerate = Path(sys.executable).with_name("accelerate")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [accelerate, "launch", "--cpu", "--num_processes", "2", *TRAIN, *command_words(place, tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert "should start 2 processes, but it started 1" in done.stderr and "torchrun --nproc_per_node 2" in done.stderr
    assert done.returncode != 0 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("who", "number", "says"),
    [
        ("1", signal.SIGKILL, "Process 1 has died without an error message"),
        ("0", signal.SIGKILL, "Process 0 has died without an error message"),
        ("1", signal.SIGTERM, "Stopped after step"),
        ("launcher", signal.SIGKILL, "Stopped after step"),
    ],
)
def test_one_process_that_ends_ends_the_run_with_its_reason_and_a_whole_checkpoint(place, tmp_path, who, number, says):
    words = command_words(place, tmp_path, **{"training.max_steps": 1_000_000, "training.save_steps": 20})
    command = torchrun_command(2, [*TRAIN, *words])
    root = Path(__file__).parents[2]
    variables = {"PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "errors", "w") as errors:
        run = subprocess.Popen(command, cwd=tmp_path, env=os.environ | variables, stdout=errors, stderr=errors)
        try:
            _wait(lambda: (tmp_path / "run" / "checkpoint-20").is_dir(), 120)
            workers = {child.environ().get("RANK"): child for child in psutil.Process(run.pid).children()}
            os.kill(run.pid if who == "launcher" else workers[who].pid, number)
            run.wait(60)
            assert not psutil.wait_procs(workers.values(), 30)[1]
        finally:
            run.kill()
    said = (tmp_path / "errors").read_text()
    lines = [line for line in said.splitlines() if line.startswith("sae_accel:") and "wait for" not in line]
    assert len(lines) == 1
    if number == signal.SIGTERM:
        assert len(re.findall(r"exitcode  : 143", said)) == 2
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert run.returncode != 0
    assert f"{newest.name}" in lines[-1]
    assert says in lines[-1]
    assert main([*words, "--training.max_steps", str(int(newest.name.split("-")[1]) + 1)] + RESUME) == 0


RESUME = ["--training.resume_from_checkpoint", "true"]


def _wait(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


LEAVING = """
import atexit, sys, time

import torch.distributed as dist

# What is registered first is called last.
atexit.register(lambda: print(f"group left: {not dist.is_initialized()}"))

from sae_accel.processes.agreement import this_process
from sae_accel.processes.watch import BEAT, Watch

with Watch():
    time.sleep(2.5 * BEAT * this_process().process_index)
"""


STOPPED = """
import os, signal, sys, time

from sae_accel.common.signals import signals
from sae_accel.processes.agreement import gather_objects, this_process
from sae_accel.processes.watch import Watch

def work():
    with Watch():
        if this_process().process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        # Waits for the other, as where one tokenises.
        gather_objects(1)

signals.command(work, owns_process=True)
"""


def test_a_signal_to_one_process_where_nothing_is_to_be_saved_ends_all_at_once_with_one_line(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    done = torchrun(2, ["stopped.py"], tmp_path)
    assert len(re.findall(r"exitcode  : 130", done.stderr)) == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("sae_accel:")]
    assert lines == ["sae_accel: Stopped by SIGINT. Nothing was saved yet: start again with the same command."]


def test_processes_that_end_well_at_different_times_leave_each_other_in_order(tmp_path):
    (tmp_path / "leaving.py").write_text(LEAVING)
    done = torchrun(2, ["leaving.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("group left: True") == 2, done.stdout

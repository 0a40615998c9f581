"""Runs on two processes, launched as on a machine with two devices, against the same run on one."""

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file
from tiny import command_words

from sae_accel.models import AutoSae
from sae_accel.train import main


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
    torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [torchrun, "--nproc_per_node", "2", "-m", "sae_accel.train", *two]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # One table, from the main process.
    assert done.stdout.count("Saved in") == 1
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

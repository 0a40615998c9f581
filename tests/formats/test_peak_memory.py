"""What loading a head takes, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_accel.models import SaeConfig, SaeModel


ROOT = Path(__file__).parent.parent.parent
D, M = 1024, 24_576
CODE = """
import re, sys
from pathlib import Path
from sae_accel import AutoSae
def peak():
    # Of this program alone: ru_maxrss begins with what its parent had.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
AutoSae.from_pretrained(sys.argv[1])
before = peak()
sae = AutoSae.from_pretrained(sys.argv[2])
size = sum(parameter.numel() * parameter.itemsize for parameter in sae.parameters())
print((peak() - before) / size, sae.num_latents)
"""


def _write(folder: Path, kind: str, d: int, m: int) -> Path:
    folder.mkdir(parents=True)
    w = {"W_enc": torch.randn(d, m), "W_dec": torch.randn(m, d), "b_enc": torch.zeros(m), "b_dec": torch.zeros(d)}
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "encoder.bias": w["b_enc"]}
    match kind:
        case "ours":
            SaeModel(SaeConfig(d_in=d, num_latents=m, k=4)).save_pretrained(folder)
        case "sae_lens":
            save_file(w, folder / "sae_weights.safetensors")
            keys = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True, "sae_lens_version": "6.0.0"}
            (folder / "cfg.json").write_text(json.dumps(keys))
        case "gemma_scope":
            np.savez(folder / "params.npz", threshold=np.ones(m, np.float32), **{k: v.numpy() for k, v in w.items()})
        case "dictionary_learning":
            torch.save({name: t.contiguous() for name, t in linear.items()} | {"bias": w["b_dec"]}, folder / "ae.pt")
            (folder / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
        case "llama_scope":
            (folder / "checkpoints").mkdir()
            tensors = {name: t.contiguous() for name, t in linear.items()} | {"decoder.bias": w["b_dec"]}
            save_file(tensors, folder / "checkpoints" / "final.safetensors")
            keys = {"jump_relu_threshold": 1.0, "dataset_average_activation_norm": {"in": 3.0}, "d_model": d}
            (folder / "hyperparams.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize("kind", ["ours", "sae_lens", "gemma_scope", "dictionary_learning", "llama_scope"])
def test_loading_takes_no_more_than_a_fifth_beside_the_head(tmp_path, kind):
    # The first load is of the same kind, and brings in what is imported on the way.
    paths = [_write(tmp_path / "small", kind, 16, 64), _write(tmp_path / "large", kind, D, M)]
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratio, num_latents = done.stdout.split()
    assert int(num_latents) == M and float(ratio) < 1.2, f"{float(ratio):.2f} times the head"
    # What is copied has been in memory, so that the figure is no figure of nothing.
    assert kind == "ours" or float(ratio) > 0.4

"""Loading and training without any package that only some need, and the line that says how to install each."""

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from tiny import command_words, write_place

from sae_accel.common.extras import EXTRAS


ROOT = Path(__file__).parents[2]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")

# A stand-in for an environment with the core alone: no finder finds a package of an extra.
WITHOUT_EXTRAS = f"""
import sys

EXTRAS = {sorted(EXTRAS)!r}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in EXTRAS else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

RUN = """
import os
from sae_accel import AutoSae
from sae_accel.train import main

base = sys.argv[1:]
def tried(*words):
    print("==", *(words or ["zero1.yaml"]), file=sys.stderr)
    return main([*base, *words])

assert main(base) == 0
heads = AutoSae.from_pretrained("run")
assert list(heads) == ["layers.1", "layers.2"] and heads["layers.1"].config.k == 4
assert not os.path.exists("run/plots") and "plots/" not in open("run/README.md").read()
for words in (
    ["--model.quantization", "8bit"],
    ["--training.optim", "adam8bit"],
    ["--model.adapter", "nowhere"],
    ["--training.loss", "kl", "--lora.train_heads"],
    ["--training.loss", "kl", "--lora.train_heads", "--dry-run", "2"],
    ["--model.gguf_file", "a.gguf"],
    ["--training.report_to", "tensorboard"],
):
    assert tried(*words) == 2
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
assert tried() == 2
assert not set(EXTRAS) & set(sys.modules)
"""


def test_the_core_alone_loads_and_trains_and_names_what_each_missing_part_needs(tmp_path):
    words = command_words(write_place(tmp_path), tmp_path, **{"training.output_dir": "run"})
    command = [sys.executable, "-c", WITHOUT_EXTRAS + RUN, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = done.stderr.split("== ")
    assert "sae_accel: The model card has no plots, since they need matplotlib. Install it: pip install" in first
    assert first.count("matplotlib") == 1 and "Traceback" not in first
    found = {other.splitlines()[0]: other.splitlines()[1:] for other in others}
    line = 'sae_accel: {} needs {}. Install it: pip install "sae_accel[{}]"'.format
    assert found == {
        "--model.quantization 8bit": [line("model.quantization 8bit", "bitsandbytes", "quantized")],
        "--training.optim adam8bit": [line("training.optim adam8bit", "bitsandbytes", "quantized")],
        "--model.adapter nowhere": [line("model.adapter", "peft", "lora")],
        "--training.loss kl --lora.train_heads": [line("lora", "peft", "lora")],
        "--training.loss kl --lora.train_heads --dry-run 2": [line("lora", "peft", "lora")],
        "--model.gguf_file a.gguf": [line("model.gguf_file", "gguf", "quickstart")],
        "--training.report_to tensorboard": [line("training.report_to tensorboard", "tensorboard", "tensorboard")],
        "zero1.yaml": [line("An Accelerate config with distributed_type: DEEPSPEED", "deepspeed", "deepspeed")],
    }


IN_PYTHON = """
import torch
from tiny import tiny_llama
from sae_accel import HeadArguments, InputError, LoraArguments, SaeTrainer, SaeTrainingArguments

def refusal(lora=None, **options):
    args = SaeTrainingArguments(output_dir="run", max_steps=1, **options)
    rows = [{"input_ids": torch.arange(8)}] * 8
    try:
        SaeTrainer(tiny_llama(), args, [HeadArguments(k=4, hookpoints="layers.1")], rows, lora=lora).train()
    except InputError as error:
        return str(error)

print(refusal(optim="adam8bit"))
print(refusal(report_to="tensorboard"))
print(refusal(loss="kl", lora=LoraArguments(train_heads=True)))
"""


def test_the_trainer_says_it_from_python_too(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_EXTRAS + IN_PYTHON]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packages = [re.search(r" needs (\w+)\. Install it: ", line)[1] for line in done.stdout.splitlines()]
    assert packages == ["bitsandbytes", "tensorboard", "peft"]


@pytest.mark.parametrize("package", EXTRAS)
def test_each_extra_installs_its_package_and_the_core_does_not(package):
    extras = {name: text.split() for name, text in SETUP["options.extras_require"].items()}
    assert any(re.match(rf"{package}\b", requirement) for requirement in extras[EXTRAS[package]])
    assert not re.search(rf"^{package}\b", SETUP["options"]["install_requires"], re.MULTILINE)
    whole = re.fullmatch(r"sae_accel\[(.*)\]", extras["all"][0])
    assert set(EXTRAS.values()) == set(whole[1].split(",")) and extras["test"][0] == "sae_accel[all]"

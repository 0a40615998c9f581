import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel
from sae_accel.recipe.command_line import parse_command_line
from sae_accel.recipe.recipe import Recipe


README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- snippet: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """Tiny folders with the names of the models, data and SAEs in the README."""
    monkeypatch.chdir(tmp_path)
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(90)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    for name in ("HuggingFaceTB/SmolLM2-135M", "meta-llama/Meta-Llama-3-8B"):
        tiny_llama().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "EleutherAI" / "SmolLM2-135M-10B").mkdir(parents=True)
    texts = Dataset.from_dict({"text": [" ".join(f"w{(i * j) % 90}" for j in range(3000)) for i in range(24)]})
    texts.to_json(tmp_path / "EleutherAI" / "SmolLM2-135M-10B" / "train.jsonl")
    for i in (1, 2, 10):
        sae = SaeModel(SaeConfig(d_in=24, k=4, hookpoint="layers.1" if i == 10 else f"layers.{i}"))
        sae.save_pretrained(tmp_path / "EleutherAI" / "sae-llama-3-8b-32x" / f"layers.{i}")


def test_the_snippet_that_trains_runs(small_world):
    # The snippet runs with smaller sizes: two steps of short sequences.
    code = SNIPPETS["train"].replace("ctx_len=2048", "ctx_len=64")
    code = code.replace(
        "per_device_train_batch_size=16", 'per_device_train_batch_size=16, max_steps=2, report_to="none"'
    )
    names = {}
    exec(code, names)
    assert list(AutoSae.from_pretrained("runs/smollm2")) == ["layers.0", "layers.2"]
    assert len([line for line in SNIPPETS["train"].splitlines() if line]) <= 20


def test_the_snippets_that_load_and_splice_run(small_world):
    names = {}
    exec(SNIPPETS["load"], names)
    layers = {}
    for i, layer in enumerate(names["lm"].model.layers):
        layer.register_forward_hook(lambda _, args, output, i=i: layers.update({i: output}))
    with torch.inference_mode():
        names["lm"](**names["inputs"])
    for i in (1, 2):
        expected = names["saes"][f"layers.{i}"].encode(layers[i])
        assert torch.equal(names["latent_acts"][i].top_indices, expected.top_indices)
    exec(SNIPPETS["splice"].replace('latents["layers.10"]', 'latents["layers.1"]'), names)
    assert torch.isfinite(names["loss"])


def test_the_recipes_and_the_command_lines_are_read():
    recipes = [Recipe.from_dict(yaml.safe_load(text)) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    assert [len(recipe.heads) for recipe in recipes] == [2, 1] and recipes[1].lora.rank == 16
    commands = re.findall(r"^accelerate launch -m sae_accel.train (.*)$", README, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        parse_command_line([word.strip('"') for word in command.split()])


def test_every_target_that_is_named_exists():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

"""
A folder in which the examples of README, documentation and docstrings run.

The LMs, datasets, heads and runs that they name are there as tiny folders of the same names, so that an example that
reads from the Hub reads from the folder instead. Only sizes are made smaller.
"""

import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_accel import train
from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


ROOT = Path(__file__).parent.parent
LMS = (
    "HuggingFaceTB/SmolLM2-135M",
    "meta-llama/Meta-Llama-3-8B",
    "openai-community/gpt2",
    "quickstart/SmolLM2-135M-Instruct",
)
DATASETS = ("EleutherAI/SmolLM2-135M-10B", "quickstart/text")
LAYERS = 12
# What an example may choose, and what is chosen in its place.
SMALLER = {"ctx_len": 16, "max_steps": 2, "per_device_train_batch_size": 4, "eval_examples": 4, "expansion_factor": 4}


def write_small_world(folder: Path) -> None:
    """Writes everything into `folder`, which is the current one."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(90)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    lm = tiny_llama(layers=LAYERS)
    for name in LMS:
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = Dataset.from_dict({"text": [" ".join(f"w{(i * j) % 90}" for j in range(100)) for i in range(16)]})
    for name in DATASETS:
        texts.to_json(folder / name / "train.jsonl")
    for i in range(LAYERS):
        sae = SaeModel(SaeConfig(d_in=24, k=4, hookpoint=f"layers.{i}"))
        sae.save_pretrained(folder / "EleutherAI" / "sae-llama-3-8b-32x" / f"layers.{i}")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        status = train.main(
            "recipes/quickstart.yaml --training.max_steps 2 --data.ctx_len 16 --data.eval_examples 4 "
            "--heads.expansion_factor 4 --heads.k 4".split()
        )
    assert status == 0


def names_for_an_example() -> dict[str, Any]:
    """What an example in a docstring finds already made, besides the small world."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sae_accel import HeadArguments, SaeTrainer, SaeTrainingArguments, chunk_and_tokenize

    model = "HuggingFaceTB/SmolLM2-135M"
    lm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer("w3 w1 w4 w1 w5 w9 w2 w6", return_tensors="pt")
    with torch.no_grad():
        hidden = lm(**inputs, output_hidden_states=True).hidden_states[2]
    dataset = load_dataset("EleutherAI/SmolLM2-135M-10B", split="train")
    tokenized = chunk_and_tokenize(dataset, tokenizer, ctx_len=16)
    arguments = SaeTrainingArguments(
        output_dir="runs/example", max_steps=2, per_device_train_batch_size=4, report_to="none",
        overwrite_output_dir=True,
    )  # fmt: skip
    trainer = SaeTrainer(lm, arguments, [HeadArguments(hookpoints="layers.1", k=4)], tokenized, tokenized)
    wide = dict(d_in=24, k=4)
    transcoder = TranscoderModel(TranscoderConfig(**wide, d_out=24, hookpoint="layers.3.mlp"))
    sae = SaeModel(SaeConfig(**wide, hookpoint="layers.1"))
    return dict(
        torch=torch, lm=lm, tokenizer=tokenizer, inputs=inputs, hidden=hidden, dataset=dataset, tokenized=tokenized,
        trainer=trainer, sae=sae, transcoder=transcoder,
    )  # fmt: skip


def smaller(code: str) -> str:
    """The same example with smaller sizes."""
    for name, size in SMALLER.items():
        code = re.sub(rf"\b{name}=[0-9_]+", f"{name}={size}", code)
    return code

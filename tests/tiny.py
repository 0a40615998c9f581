"""Language models, data and runs that are small enough to make within a test."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from sae_accel.recipe.arguments import HeadArguments, SaeTrainingArguments
from sae_accel.training.trainer import SaeTrainer


VOCAB = 101


def tiny_llama(layers: int = 4, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # The config has dropout, so a trainer that leaves the LM in training mode fails a test.
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=4, n_positions=64))


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=64,
        )
    )


def tiny_tokens(rows: int = 64, ctx_len: int = 16, seed: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(0, VOCAB, (rows, ctx_len), generator=generator).tolist()})


def trained_llama() -> tuple[LlamaForCausalLM, Dataset]:
    """An LM that has learnt to count, and its data: in each sequence a token is one more than the token before."""
    lm = tiny_llama()
    starts = torch.randint(0, VOCAB, (64, 1), generator=torch.Generator().manual_seed(2))
    rows = (starts + torch.arange(16)) % VOCAB
    optimizer = torch.optim.Adam(lm.parameters(), lr=1e-2)
    for _ in range(60):
        lm(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm, Dataset.from_dict({"input_ids": rows.tolist()})


def tiny_trainer(output_dir, heads=None, lm=None, train=None, held_out=None, **kwargs) -> SaeTrainer:
    options = {
        name: kwargs.pop(name)
        for name in ("exclude_tokens", "callbacks", "processing_class", "lora")
        if name in kwargs
    }
    arguments = dict(
        output_dir=str(output_dir), per_device_train_batch_size=4, logging_steps=5, save_steps=1000, report_to="none"
    )
    return SaeTrainer(
        lm or tiny_llama(),
        SaeTrainingArguments(**(arguments | kwargs)),
        heads or [HeadArguments(hookpoints="layers.[12]", k=4, expansion_factor=4)],
        train or tiny_tokens(),
        held_out,
        **options,
    )


def write_place(folder: Path) -> Path:
    """Writes an LM, its tokenizer and a text into a folder."""
    tiny_llama().save_pretrained(folder / "lm")
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(VOCAB - 2)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "lm"
    )
    ids = torch.randint(0, VOCAB - 2, (40, 30), generator=torch.Generator().manual_seed(0))
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids.tolist()]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def command_words(place, tmp_path, **changes) -> list[str]:
    """The words of a command line for a short run on the files of the fixture `place`."""
    values = {
        "model.name_or_path": place / "lm",
        "data.path": place / "text.jsonl",
        "data.ctx_len": 16,
        "data.eval_examples": 8,
        "heads.hookpoints": "layers.[12]",
        "heads.k": 4,
        "heads.expansion_factor": 4,
        "training.output_dir": tmp_path / "run",
        "training.max_steps": 3,
        "training.report_to": "none",
    } | changes
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def forbid_loading(monkeypatch) -> None:
    """Makes a test fail if a run gets as far as loading the LM's weights."""

    def load(*args, **kwargs):
        raise AssertionError("the LM's weights were about to be read")

    monkeypatch.setattr("sae_accel.training.run.load_lm", load)


def torchrun_command(processes: int, words: list) -> list[str]:
    """The words of a torchrun command, on a port that no other test uses at the same time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = str(Path(sys.executable).with_name("torchrun"))
    return [launcher, "--nproc_per_node", str(processes), "--master_port", port, *map(str, words)]


def torchrun(processes: int, words: list, cwd, **environment) -> subprocess.CompletedProcess:
    """Runs processes on CPUs, with the package of this checkout."""
    root = Path(__file__).parent.parent
    variables = {"PYTHONPATH": f"{root}:{root / 'tests'}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    variables["PYTHONFAULTHANDLER"] = "1"
    return subprocess.run(
        torchrun_command(processes, words),
        cwd=cwd,
        env=os.environ | variables | environment,
        capture_output=True,
        text=True,
    )


def run_together(processes: int, runs: dict[str, dict], folder, **environment) -> tuple[dict[str, list[dict]], str]:
    """
    Does several runs in one launch.

    Args:
        processes (`int`): Number of processes.
        runs (`dict[str, dict]`): The runs by name, each with its `words` and `environment`.
        folder (`Path`): Working folder of the launch.

    Returns:
        `tuple`: for each run the findings of each process, and the lines on standard error.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    done = torchrun(processes, [Path(__file__).with_name("many_runs.py"), folder], folder, **environment)
    # An aborted process prints its stack, and then pages of library names, which are cut.
    assert done.returncode == 0, re.sub("(?m)^Extension modules.*", "", done.stderr)[-15_000:]
    found = {name: [json.loads((folder / f"{name}.{i}.json").read_text()) for i in range(processes)] for name in runs}
    return found, done.stderr


class Stop(TrainerCallback):
    """Ends a run after a step as a kill would: nothing is saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise SystemExit("killed")


class Course(TrainerCallback):
    """Records the bank's weights before the first step and after each, and the gradients of each backward pass."""

    def __init__(self):
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._take, name))
        self._end_step(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._end_step(model)

    def _take(self, name, parameter):
        self.gradients[-1][name] = parameter.grad.clone()

    def _end_step(self, model):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
        self.gradients.append({})


def whole_and_resumed(folder, make, step: int = 5) -> tuple[SaeTrainer, SaeTrainer]:
    """Does two runs of `make`: one without a stop, and one that is killed after `step` and then resumed."""
    whole = make(folder / "whole")
    whole.train()
    with pytest.raises(SystemExit):
        make(folder / "parts", callbacks=[Stop(step)]).train()
    resumed = make(folder / "parts")
    resumed.train(resume_from_checkpoint=True)
    return whole, resumed


def weights(trainer: SaeTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.bank.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

"""
Measures the cost of two safeguards: the share of a training step that checks whether its numbers are finite, and the
speed at which a resumed run reaches its old position in a stream. The second is compared with `skip` of `datasets`,
which makes all sequences again.

  python benchmarks/soundness.py
  python benchmarks/soundness.py --documents 100000 --save benchmarks/results/my-machine-soundness.json
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import patch

import torch
from datasets import Dataset, disable_progress_bars
from throughput import StepClock, silence
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from sae_accel import HeadArguments, SaeTrainer, SaeTrainingArguments, chunk_and_tokenize
from sae_accel.data.tokens import load_tokens
from sae_accel.ops.finite import surely_finite
from sae_accel.recipe.arguments import DataArguments
from sae_accel.spread.base import Spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/SmolLM2-135M-Instruct", help="Hub id or folder of the LM")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps; the first two are not measured")
    parser.add_argument("--documents", type=int, default=20_000, help="documents of 600 characters in the stream")
    parser.add_argument("--save", type=Path, help="file for the figures")
    options = parser.parse_args()
    disable_progress_bars()
    logging.disable(logging.WARNING)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= finite_checks(options, tokenizer) | skipping(options, tokenizer)
    for key, value in found.items():
        print(f"{key:42}{value if isinstance(value, str) else f'{value:,.0f}' if value > 100 else f'{value:.3g}'}")
    if options.save:
        options.save.write_text(json.dumps(found, indent=2) + "\n")


def finite_checks(options: argparse.Namespace, tokenizer) -> dict[str, float]:
    """Returns the milliseconds of a step and of the checks in it, by the device's own clock if it has one."""
    spent: list[float] = []

    def timed(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            spent.append(now() - start)
            return result

        return call

    checks = {
        "sae_accel.activations.trained_rows.surely_finite": surely_finite,
        "sae_accel.spread.base.Spread.non_finite_gradients": Spread.non_finite_gradients,
    }
    lm = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    text = Dataset.from_dict({"text": list(topics.values())})
    rows = chunk_and_tokenize(text, tokenizer, ctx_len=256)
    rows = rows.select([i % len(rows) for i in range(8 * options.steps)]).with_format("torch")
    clock, totals = StepClock(), []

    class Total(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            totals.append(sum(spent))

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack, silence():
        for name, function in checks.items():
            stack.enter_context(patch(name, timed(function)))
        arguments = SaeTrainingArguments(output_dir=folder, per_device_train_batch_size=8, report_to="none")
        head = HeadArguments(hookpoints="layers.2", k=32, expansion_factor=32)
        SaeTrainer(lm, arguments, [head], rows, callbacks=[Total(), clock]).train()
    step, check = (
        1000 * statistics.median(after - before for before, after in itertools.pairwise(series[1:]))
        for series in (clock.times, totals)
    )
    return {"step, 2,048 tokens, 18,432 latents (ms)": step, "checks in it (ms)": check, "part": check / step}


def skipping(options: argparse.Namespace, tokenizer) -> dict[str, float]:
    """Returns the documents and tokens per second on the way to the last tenth of a stream."""
    texts = "".join(topics.values())
    with tempfile.TemporaryDirectory() as folder, silence():
        path = Path(folder) / "text.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for i in range(options.documents):
                start = 97 * i % (len(texts) - 600)
                file.write(json.dumps({"text": texts[start : start + 600]}) + "\n")
        data = DataArguments(path=str(path), streaming=True, ctx_len=512, eval_examples=0)
        stream, _ = load_tokens(data, tokenizer, vocab_size=len(tokenizer))
        count = 9 * sum(1 for _ in stream) // 10
        ours = seconds_to_first(stream.begun(count, tells=False))
        theirs = seconds_to_first(stream.whole.skip(count))
    passed = 0.9 * options.documents
    return {
        "documents passed": passed,
        "tokens passed": 512.0 * count,
        "sae_accel: documents/s": passed / ours,
        "sae_accel: tokens/s": 512 * count / ours,
        "datasets' skip: documents/s": passed / theirs,
        "datasets' skip: tokens/s": 512 * count / theirs,
    }


def seconds_to_first(rows: Iterator) -> float:
    start = time.perf_counter()
    next(iter(rows))
    return time.perf_counter() - start


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def processor() -> str:
    """Returns the processor's name, as `lscpu` shows it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()

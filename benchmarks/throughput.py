"""
Measures the training speed of sae_accel and of sparsify (PyPI: eai-sparsify). Each package runs its own trainer in the
same process, in turns, on the same LM, tokens, sizes and optimizer.

A turn is a short run of one trainer. The benchmark measures the time from the end of one optimizer step to the end of
the next, so starting and saving do not count, and each turn's first steps do not count either. It shows the median
over all turns.

  python benchmarks/throughput.py                      # SmolLM2-135M-Instruct, layers.2, 2,048 tokens per step
  python benchmarks/throughput.py --hookpoint layers.14 --turns 5 --save benchmarks/results/my-machine.json
  python benchmarks/throughput.py --loss ce --batch-size 4 --steps 5 --turns 2
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from sae_accel import HeadArguments, SaeTrainer, SaeTrainingArguments, chunk_and_tokenize


class StepClock(TrainerCallback):
    """Notes when each optimizer step of sae_accel ends, and its loss."""

    def __init__(self):
        self.times, self.losses = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [value for key, value in logs.items() if key.startswith(("train/fvu/", "train/ce"))]


def main() -> None:
    options = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lm = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    data = tokens(options)
    peers = {"sae_accel": train_ours, "sparsify": train_sparsify}
    seconds = {name: [] for name in peers}
    losses, memory = {}, {}
    for turn in range(options.turns):
        for name, train in peers.items():
            with tempfile.TemporaryDirectory() as folder, silence():
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times, losses[name] = train(lm, data, options, folder)
            steps = [after - before for before, after in zip(times, times[1:], strict=False)]
            seconds[name] += steps[options.warmup :]
            if device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
        print(f"turn {turn + 1}/{options.turns} done", file=sys.stderr)
    report(options, seconds, losses, memory, device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/SmolLM2-135M-Instruct", help="Hub id or folder of the LM")
    parser.add_argument("--hookpoint", default="layers.2")
    parser.add_argument("--expansion-factor", type=int, default=32)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--loss", default="fvu", choices=("fvu", "ce"))
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step")
    parser.add_argument("--ctx-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps per turn")
    parser.add_argument("--warmup", type=int, default=2, help="first steps of a turn that are not measured")
    parser.add_argument("--threads", type=int, help="CPU threads of both packages")
    parser.add_argument("--save", type=Path, help="file for the figures")
    return parser.parse_args()


def tokens(options: argparse.Namespace) -> Dataset:
    """Returns sequences of Python's language reference: real text, since the text decides which latents are active."""
    from pydoc_data.topics import topics

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Dataset.from_dict({"text": list(topics.values())})
    data = chunk_and_tokenize(text, tokenizer, ctx_len=options.ctx_len)
    needed = options.batch_size * options.steps
    return data.select([i % len(data) for i in range(needed)]).with_format("torch")


def train_ours(lm, data, options, folder) -> tuple[list[float], float]:
    """Trains one turn of sae_accel: returns when each step ended, and the first step's loss."""
    clock = StepClock()
    head = HeadArguments(hookpoints=options.hookpoint, k=options.k, expansion_factor=options.expansion_factor)
    arguments = SaeTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        optim="signum",
        loss=options.loss,
        logging_steps=1,
        report_to="none",
    )
    SaeTrainer(lm, arguments, [head], data, callbacks=[clock]).train()
    return clock.times, clock.losses[0]


def train_sparsify(lm, data, options, folder) -> tuple[list[float], float]:
    """Trains one turn of sparsify: returns when each step ended, and the first step's loss."""
    from sparsify import SaeConfig, TrainConfig, Trainer

    config = TrainConfig(
        SaeConfig(expansion_factor=options.expansion_factor, k=options.k),
        batch_size=options.batch_size,
        optimizer="signum",
        hookpoints=[options.hookpoint],
        loss_fn=options.loss,
        log_to_wandb=False,
        save_dir=folder,
    )
    trainer = Trainer(config, data, lm)
    times, losses = [], []
    optimizer = trainer.optimizers[0]
    step, forward = optimizer.step, type(trainer.saes[options.hookpoint]).forward

    def timed_step(*args, **kwargs):
        step(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    def noted_forward(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        losses.append(output.fvu)
        return output

    def noted_ce(module, args, output):
        losses.append(output.loss)

    optimizer.step = timed_step
    sae = trainer.saes[options.hookpoint]
    if options.loss == "fvu":
        sae.forward = noted_forward.__get__(sae)
    trainer.save = lambda: None
    handle = lm.register_forward_hook(noted_ce) if options.loss == "ce" else None
    trainer.fit()
    if handle is None:
        return times, float(losses[0])
    handle.remove()
    # Sparsify's first pass measures the LM without heads.
    return times, float(losses[1])


@contextlib.contextmanager
def silence():
    """Hides the output of both trainers, so that only the table is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def report(options, seconds, losses, memory, device) -> None:
    """Prints both packages side by side, and saves the figures on request."""
    per_step = options.batch_size * options.ctx_len
    speed = {name: per_step / statistics.median(values) for name, values in seconds.items()}
    spread = {name: (per_step / max(values), per_step / min(values)) for name, values in seconds.items()}
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(f"{options.model}, {options.hookpoint}, {options.expansion_factor}x, k {options.k}, loss {options.loss},")
    print(f"{per_step:,} tokens per step,", end=" ")
    print(f"signum, {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'':12}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'first loss':>12}" + ("  GiB" if memory else ""))
    for name in seconds:
        slow, fast = spread[name]
        used = f"{memory[name]:5.1f}" if memory else ""
        print(f"{name:12}{speed[name]:>10,.0f}{slow:>10,.0f}{fast:>10,.0f}{losses[name]:>12.5f}{used}")
    ratio = speed["sae_accel"] / speed["sparsify"]
    print(f"\nsae_accel trains {ratio:.1f} times as fast. The first losses are a sanity check; the weights differ.")
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        figures = {"tokens_per_second": speed, "spread": spread, "ratio": ratio, "first_loss": losses, "gib": memory}
        setting = {key: str(value) for key, value in vars(options).items() if key != "save"}
        setting |= {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
        options.save.write_text(json.dumps({"setting": setting, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

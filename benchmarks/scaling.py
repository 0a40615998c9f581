"""
Measures how much faster several processes train, and how many bytes they send to each other. The table has a row for
each way in which sae_accel and sparsify (PyPI: eai-sparsify) spread heads over processes. Each package runs its own
trainer, on the same LM, tokens, heads and optimizer.

Torchrun starts each row for some steps, in turns with the other rows, so that a busy minute of the machine slows down
all rows alike. A step trains on the same number of tokens in every row, dealt out evenly to the processes. The
benchmark measures the time from the end of one optimizer step to the end of the next, without each turn's first
steps, and shows the median over all turns. If there are fewer GPUs than processes, all rows run on CPUs with one
thread per process, also the rows with one process.

Bytes are counted on CPUs, where processes send them by gloo over TCP: the kernel counts them for each connection.

  python benchmarks/scaling.py                         # SmolLM2-135M-Instruct, SAEs on two layers, 2 processes
  python benchmarks/scaling.py --turns 5 --patience 20 --save benchmarks/results/my-machine-scaling.json
  python benchmarks/scaling.py --processes 4 --hookpoints layers.1 layers.3 layers.5 layers.7 --batch-size 32
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from datasets import Dataset
from scaling_rows import ROWS, Row, Sizes
from throughput import tokens
from transformers import AutoConfig, AutoModel, TrainerCallback

from sae_accel import HeadArguments, SaeTrainer, SaeTrainingArguments


PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "eai-sparsify")
# Offset of tcpi_bytes_acked, 64 bits, in the kernel's struct tcp_info.
BYTES_ACKED = 120
# Bytes per second that are too few to change a row's figure.
NEGLIGIBLE = 1000
# Share of the cores that other programs may take during a turn.
CALM = 0.1


def main() -> None:
    options = parse_arguments()
    if options.worker:
        work(options)
        return
    on_gpus = torch.cuda.device_count() >= options.processes
    turns: dict[str, list[list[dict]]] = {name: [] for name in options.rows}
    refusals: dict[str, str] = {}
    others: list[float] = []
    deadline = time.monotonic() + 60 * options.patience
    for turn in range(options.turns):
        for name in [name for name in options.rows if name not in refusals]:
            found, share = calm_launch(name, options, on_gpus, deadline)
            others.append(share)
            if isinstance(found, str):
                refusals[name] = found
            else:
                turns[name].append(found)
        print(f"turn {turn + 1}/{options.turns} done", file=sys.stderr)
    report(options, turns, refusals, others, on_gpus)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart/SmolLM2-135M-Instruct", help="Hub id or folder of the LM")
    parser.add_argument(
        "--hookpoints", nargs="+", default=["layers.1", "layers.3"], help="modules of the LM; each gets one SAE"
    )
    parser.add_argument("--expansion-factor", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    # With 8, malloc keeps the largest tensor of two processes for the next step, but not that of one process.
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per step, over all processes")
    parser.add_argument("--ctx-len", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2, help="processes that are compared with one")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per turn")
    parser.add_argument("--warmup", type=int, default=1, help="first steps of a turn that are not measured")
    parser.add_argument(
        "--patience", type=float, default=0, help="minutes in which a turn runs again if other programs use the cores"
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="rows to run; all by default")
    parser.add_argument("--save", type=Path, help="file for the figures")
    parser.add_argument("--worker", choices=ROWS, help="for torchrun: run one turn of this row on one process")
    parser.add_argument("--folder", type=Path, help="folder for the figures of workers")
    options = parser.parse_args()
    if options.batch_size % options.processes:
        parser.error(f"--batch-size {options.batch_size} cannot be dealt out evenly to {options.processes} processes")
    if not 1 <= options.warmup < options.steps:
        parser.error("--warmup must be at least 1, and less than --steps")
    return options


def calm_launch(
    name: str, options: argparse.Namespace, on_gpus: bool, deadline: float
) -> tuple[list[dict] | str, float]:
    """
    Runs one turn of a row, and returns the share of the cores that other programs took. If this share is too large,
    the turn runs again until the deadline.
    """
    while True:
        before = core_seconds()
        found = launch(name, options, on_gpus)
        passed, not_ours = (after - start for after, start in zip(core_seconds(), before, strict=True))
        share = not_ours / passed
        if share <= CALM or isinstance(found, str) or time.monotonic() > deadline:
            return found, share
        time.sleep(10)


def launch(name: str, options: argparse.Namespace, on_gpus: bool) -> list[dict] | str:
    """Runs one turn of a row: returns the notes of each process, or why the row cannot run."""
    row = ROWS[name]
    processes = options.processes if row.theory else 1
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | row.environment
    if not on_gpus:
        environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [__file__, *sys.argv[1:], "--worker", name, "--folder", folder]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            return reason(done.stderr)
        return [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(processes)]


def core_seconds() -> tuple[float, float]:
    """Returns the seconds that have passed on all cores, and the part of them that other programs took."""
    times = psutil.cpu_times()._asdict()
    passed, idle = time.monotonic() * os.cpu_count(), times["idle"] + times.get("iowait", 0.0)
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    return passed, passed - idle - ours.ru_utime - ours.ru_stime


def reason(stderr: str) -> str:
    """Returns the first error in the processes' output; the others follow from it."""
    found = re.search(r"^(?:\[rank\d+\]: *)?((?:\w+\.)*\w*(?:Error|Exception): .+)", stderr, re.MULTILINE)
    return found[1] if found else stderr.strip()[-200:]


class StepClock(TrainerCallback):
    """Notes when each optimizer step ends, the bytes that this process has sent by then, and the first step's FVUs."""

    def __init__(self):
        self.times, self.sent, self.fvus = [], [], []

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.sent.append(bytes_sent())

    def on_step_end(self, args, state, control, **kwargs):
        self.tick()
        # Only the first step, which is not measured, is logged, and no checkpoint is written.
        control.should_log, control.should_save = state.global_step == 1, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.fvus += [value for key, value in logs.items() if key.startswith("train/fvu/")]


def bytes_sent() -> int:
    """
    Returns the bytes that have arrived from this process over its open TCP connections, without headers.

    The counters of a network interface would also count the traffic of other programs.
    """
    total = 0
    for descriptor in os.listdir("/proc/self/fd") if sys.platform == "linux" else []:
        try:
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
                    total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
        except OSError:
            pass  # Not a socket.
    return total


def work(options: argparse.Namespace) -> None:
    """Runs one turn of a row on this process, and writes its notes to a file."""
    row, index = ROWS[options.worker], int(os.environ["RANK"])
    on_gpu = torch.cuda.is_available()
    lm = AutoModel.from_pretrained(options.model, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()
    clock = StepClock()
    train = train_ours if row.package == "sae_accel" else train_sparsify
    train(row, lm, tokens(options), options, clock)
    figures = {"times": clock.times, "sent": clock.sent, "fvu": statistics.mean(clock.fvus)}
    if dist.is_initialized():
        dist.barrier()
        before = bytes_sent()
        time.sleep(1)
        figures["idle"] = bytes_sent() - before
        dist.destroy_process_group()
    (options.folder / f"{index}.json").write_text(json.dumps(figures))


def train_ours(row: Row, lm, data: Dataset, options: argparse.Namespace, clock: StepClock) -> None:
    """Trains one turn of sae_accel; the environment selects FSDP or ZeRO."""
    head = HeadArguments(hookpoints=options.hookpoints, k=options.k, expansion_factor=options.expansion_factor)
    arguments = SaeTrainingArguments(
        output_dir=str(options.folder / "run"),
        per_device_train_batch_size=options.batch_size // int(os.environ["WORLD_SIZE"]),
        optim="signum",
        report_to="none",
        **row.arguments,
    )
    SaeTrainer(lm, arguments, [head], data, callbacks=[clock]).train()


def train_sparsify(row: Row, lm, data: Dataset, options: argparse.Namespace, clock: StepClock) -> None:
    """Trains one turn of sparsify, set up like its command line, which needs GPUs."""
    import sparsify.trainer
    from sparsify import SaeConfig, TrainConfig, Trainer

    index, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(index)
    if processes > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        wrapper = sparsify.trainer.DDP
        # The trainer gives the process's GPU to DDP, and DDP refuses it for parameters on a CPU.
        sparsify.trainer.DDP = lambda sae, device_ids: wrapper(sae)
    size = options.batch_size // processes
    # As in sae_accel, each process reads its own part of each step's sequences.
    own = [i for i in range(len(data)) if i % options.batch_size // size == index]
    config = TrainConfig(
        SaeConfig(expansion_factor=options.expansion_factor, k=options.k),
        batch_size=size,
        optimizer="signum",
        hookpoints=options.hookpoints,
        log_to_wandb=False,
        save_dir=str(options.folder),
        **row.arguments,
    )
    trainer = Trainer(config, data.select(own), lm.cuda() if on_gpu else lm)
    watch(trainer, clock)
    trainer.fit()


def watch(trainer: Any, clock: StepClock) -> None:
    """Makes sparsify's trainer report its steps and its first FVUs to the clock, and write no files."""
    step = trainer.optimizers[0].step

    def timed_step(*args, **kwargs):
        step(*args, **kwargs)
        clock.tick()

    def noted(module, args, output):
        if len(clock.fvus) < len(trainer.saes):
            clock.fvus.append(float(output.fvu))

    trainer.optimizers[0].step = timed_step
    trainer.save = lambda: None
    for sae in trainer.saes.values():
        sae.register_forward_hook(noted)


def report(
    options: argparse.Namespace,
    turns: dict[str, list[list[dict]]],
    refusals: dict[str, str],
    others: list[float],
    on_gpus: bool,
) -> None:
    """Prints the table, and saves the figures on request."""
    sizes = sizes_of(options, on_gpus)
    rows = [
        {"package": ROWS[name].package, "way": ROWS[name].way}
        | ({"cannot_run": refusals[name]} if name in refusals else figures(ROWS[name], turns[name], options, sizes))
        for name in options.rows
    ]
    compare(rows)
    names = ("hookpoints", "expansion_factor", "k", "ctx_len", "batch_size", "turns", "steps", "warmup")
    setting = {
        "model": Path(options.model).name,
        **{name: getattr(options, name) for name in names},
        "optimizer": "signum",
        "machine": machine(on_gpus),
        "threads_per_process": 1,
        "cores_taken_by_others": {"median": statistics.median(others), "most": max(others)},
        "packages": {one.name: one.version for one in importlib.metadata.distributions() if one.name in PACKAGES},
    }
    if on_gpus or sys.platform != "linux":
        for row in rows:
            row |= {"bytes_per_token": None} if "processes" in row else {}
    print_setting(setting, sizes)
    print_table(rows)
    print_notes(setting, rows)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


def sizes_of(options: argparse.Namespace, on_gpus: bool) -> Sizes:
    width, sites = AutoConfig.from_pretrained(options.model).hidden_size, len(options.hookpoints)
    num_latents = width * options.expansion_factor
    return Sizes(
        processes=options.processes,
        tokens=options.batch_size * options.ctx_len,
        parameters=sites * (num_latents * (2 * width + 1) + width),
        sites=sites,
        width=width,
        itemsize=2 if on_gpus else 4,
        k=options.k,
    )


def figures(row: Row, turns: list[list[dict]], options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Returns a row's results over all turns. Times are the first process's; bytes are the sum over processes."""
    times = [turn[0]["times"][options.warmup - 1 :] for turn in turns]
    seconds = [after - before for ends in times for before, after in zip(ends, ends[1:], strict=False)]
    sent = [sum(process["sent"][-1] - process["sent"][options.warmup - 1] for process in turn) for turn in turns]
    idle = [sum(process.get("idle", 0) for process in turn) for turn in turns]
    steps = options.steps - options.warmup
    return {
        "processes": len(turns[0]),
        "tokens_per_second": sizes.tokens / statistics.median(seconds),
        "slowest": sizes.tokens / max(seconds),
        "fastest": sizes.tokens / min(seconds),
        "bytes_per_token": statistics.median(sent) / (steps * sizes.tokens),
        "bytes_per_token_in_theory": row.theory(sizes) if row.theory else 0,
        "idle_bytes_per_second": min(idle),
        "first_fvu": statistics.mean(process["fvu"] for process in turns[0]),
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its gain over one process of the same package, if that row ran."""
    alone = {row["package"]: row["tokens_per_second"] for row in rows if row.get("processes") == 1}
    for row in rows:
        if row["package"] in alone and "processes" in row:
            row["speed_up"] = row["tokens_per_second"] / alone[row["package"]]
            row["efficiency"] = row["speed_up"] / row["processes"]


def machine(on_gpus: bool) -> str:
    if on_gpus:
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def print_setting(setting: dict[str, Any], sizes: Sizes) -> None:
    heads = f"SAEs on {', '.join(setting['hookpoints'])}, {setting['expansion_factor']}x, k {setting['k']}"
    print(f"{setting['model']}, {heads}, {setting['optimizer']},")
    print(f"{sizes.tokens:,} tokens per step over all processes, {setting['machine']}, one thread per process,")
    print(", ".join(f"{name} {version}" for name, version in sorted(setting["packages"].items())) + "\n")


def print_table(rows: list[dict[str, Any]]) -> None:
    names = ("tokens/s", "slowest", "fastest", "speed-up", "efficiency", "bytes/token", "theory", "   FVU")
    print(f"{'':29}{'processes':>9}" + "".join(f"{name:>{len(name) + 2}}" for name in names))
    for row in rows:
        print(f"{row['package']:10}{row['way']:19}", end="")
        if "cannot_run" in row:
            print(f"  cannot run: {row['cannot_run']}")
            continue
        cells = [f"{row[name]:,.0f}" for name in ("tokens_per_second", "slowest", "fastest")]
        cells += [f"{row['speed_up']:.2f}", f"{row['efficiency']:.0%}"] if "speed_up" in row else ["-", "-"]
        cells += ["-" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:,.0f}"]
        cells += [f"{row['bytes_per_token_in_theory']:,.0f}", f"{row['first_fvu']:.4f}"]
        cells = [f"{cell:>{len(name) + 2}}" for name, cell in zip(names, cells, strict=True)]
        print(f"{row['processes']:>9}" + "".join(cells))


def print_notes(setting: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    print("\nSpeed-up and efficiency compare with one process of the same package. Bytes per token are the sum over")
    print("all processes, as counted and in theory. FVU is the first step's; it is the same for the same work.")
    counted = [row for row in rows if row.get("bytes_per_token") is not None]
    if any(row["way"] in ("FSDP", "ZeRO-2") for row in counted):
        print("Gloo and DeepSpeed scatter with an all-reduce, so FSDP and ZeRO-2 send the parameters once more.")
    idle = max((row["idle_bytes_per_second"] for row in counted), default=0)
    if idle > NEGLIGIBLE:
        print(f"Bytes include up to {idle:,.0f} per second that are sent even when nothing trains.")
    others = setting["cores_taken_by_others"]
    print(f"Other programs took {others['median']:.0%} of the cores, at most {others['most']:.0%} during one turn.")


if __name__ == "__main__":
    main()

"""What the processes of one run owe each other before and around training: agreement, order and word of a death."""

import atexit
import hashlib
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ..common.errors import InputError


T = TypeVar("T")
PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# Seconds between two signs of life, and without one after which a process counts as dead: below a minute, but longer
# than any call that keeps other threads of its process from running.
BEAT, SILENCE = 1.0, 45.0
# In what gloo and NCCL say when the process at the other end is no more.
_LOST = ("Connection", "connection", "closed by peer", "NCCL", "Broken pipe", "timed out", "Timed out")


def this_process() -> PartialState:
    """This process among others. Made without the flag, it would be alone wherever Accelerate is told to use CPUs."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def agreed(work: Callable[[], T]) -> T:
    """
    What `work` gives on this process, once every process has done its own.

    Raises:
        `InputError`: on all processes if it was raised on one, with the message of the first of those.
    """
    if this_process().num_processes == 1:
        return work()
    result = refusal = None
    try:
        result = work()
    except InputError as error:
        refusal = error
    refusals = gathered(refusal and str(refusal))
    first = next((message for message in refusals if message is not None), None)
    if first is not None:
        raise refusal if str(refusal) == first else InputError(first)
    return result


def gathered(value: Any) -> list[Any]:
    """`value` of each process, on every process, however long the slowest takes."""
    process = this_process()
    values = [value] * process.num_processes
    if process.num_processes > 1:
        dist.all_gather_object(values, value, group=_patient_group())
    return values


def collected(part: Tensor) -> list[Tensor] | None:
    """
    Each process's `part`, on the CPU of the main process; None on the others. No device holds more than its own.

    Args:
        part (`torch.Tensor`): Of one dtype on all processes, and of one size but in its first dimension.
    """
    process = this_process()
    own = part.detach().cpu().contiguous()
    lengths = gathered(len(own))
    if not process.is_main_process:
        if len(own):
            dist.send(own, 0, group=_patient_group())
        return None
    pieces = [own, *(own.new_empty(length, *own.shape[1:]) for length in lengths[1:])]
    for source, piece in enumerate(pieces):
        if source and len(piece):
            dist.recv(piece, source, group=_patient_group())
    return pieces


def first_on_node(work: Callable[[], T], task: str) -> T:
    """
    What `work` gives, done by one process of each machine first, so that the others find it done in a cache.

    Args:
        work (`Callable`): What is done.
        task (`str`): What it is, in words that follow "waits for": one line on standard error says who waits.
    """
    process = this_process()
    if process.num_processes == 1:
        return work()
    first = process.is_local_main_process
    if process.local_process_index == 1:
        print(f"sae_accel: every other process of this machine waits for {task} by its first.", file=sys.stderr)
    result = agreed(work if first else lambda: None)
    return agreed((lambda: result) if first else work)


def check_alike(settings: dict[str, Any]) -> None:
    """
    Checks that all processes run the same, by the same versions.

    Args:
        settings (`dict[str, Any]`): What this process runs, in values that can be compared, nested or not.

    Raises:
        `InputError`: on every process, with the first difference.
    """
    versions = {f"package {name}": importlib.metadata.version(name) for name in PACKAGES}
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
    versions["code of sae_accel"] = hashlib.sha256(code).hexdigest()[:12]
    everyone = gathered(versions | dict(_flat(settings)))
    for index, other in enumerate(everyone):
        for key in everyone[0] | other:
            if everyone[0].get(key) != other.get(key):
                raise InputError(
                    f"{key}: process 0 has {everyone[0].get(key)!r}, but process {index} has {other.get(key)!r}. "
                    "Start all processes with one recipe and one installation."
                )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value in nested mappings and lists, with its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, value
    else:
        for key, inside in pairs:
            name = f"[{key}]" if isinstance(value, list) else f".{key}"
            yield from _flat(inside, (path + name).removeprefix("."))


def check_launched() -> None:
    """
    Checks that as many processes train together as were started, and as many were started as `accelerate launch` was
    asked for: on CPUs it starts one a machine.

    Raises:
        `InputError`: if there are fewer.
    """
    here, asked = int(os.environ.get("WORLD_SIZE", 1)), _asked_processes()
    if this_process().num_processes < here:
        raise InputError(
            f"{here} processes were started, but there is no device for each, so that Accelerate takes each for "
            "alone. Set ACCELERATE_USE_CPU=true to train on CPUs."
        )
    if asked is not None and here < asked:
        raise InputError(
            f"accelerate launch was asked for {asked} processes, but started {here}, as it does on CPUs. Start them "
            f"with ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} -m sae_accel.train ..., or ask for 1."
        )


def _asked_processes() -> int | None:
    """What `accelerate launch` was told in its words or its config file, if it is what started this process."""
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    if "launch" not in words[:4] or not any("accelerate" in word for word in words[:3]):
        return None
    options, _ = launch_command_parser().parse_known_args(words[words.index("launch") + 1 :])
    if options.num_processes is None and (options.config_file or os.path.isfile(default_config_file)):
        return load_config_from_file(options.config_file).num_processes
    return options.num_processes


@cache
def _patient_group() -> dist.ProcessGroup:
    """Processes that wait for each other as long as it takes: tokenisation may last for hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


@atexit.register
def _end_processes() -> None:
    """Else a thread of the group that outlives the interpreter now and then aborts a process whose work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Watch:
    """
    Each process gives signs of life while this is open, and the first process ends the run if one of them falls silent
    or says why it ends.

    A dead process leaves the others waiting in a collective, on GPUs for as long as its timeout.

    Args:
        last_words (`Callable[[], str]`): What else to say when the run ends so, such as which checkpoint is whole.
    """

    def __init__(self, last_words: Callable[[], str] = str):
        self.process = this_process()
        self.last_words = last_words
        self._closed = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}

    def __enter__(self) -> "Watch":
        if self.process.num_processes > 1:
            self._store = self._connect()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.process.num_processes == 1:
            return
        unforeseen = error is not None and not isinstance(error, InputError | KeyboardInterrupt)
        if unforeseen:
            self._explain(error)
        self._closed.set()
        try:
            self._store.set(f"closed/{self.process.process_index}", "1")
            if self.process.is_main_process and not unforeseen:
                # To the others a store that is gone means that this process has died.
                everyone = [f"closed/{index}" for index in range(self.process.num_processes)]
                self._store.wait(everyone, timedelta(seconds=4 * BEAT))
        except RuntimeError:
            pass  # The first process, which kept the store, has gone, or one of the others.
        self._thread.join()

    def _connect(self) -> dist.TCPStore:
        first = self.process.is_main_process
        host = os.environ.get("MASTER_ADDR", "localhost")
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if first else None
        port = gathered(store and store.port)[0]
        return store or dist.TCPStore(host, port, is_master=False)

    def _explain(self, error: BaseException) -> None:
        """Says why this process ends; if it ends because another did, that is the reason that counts."""
        if threading.current_thread() is threading.main_thread():
            # The launcher, which ends all once one has ended, must leave time to say so.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
        if not self.process.is_main_process:
            if not lost:
                reason = " ".join(str(error).split())[:1000]
                self._store.set(f"ended/{self.process.process_index}", f"{type(error).__name__}: {reason}")
            return
        deadline = time.monotonic() + 8 * BEAT
        while lost and time.monotonic() < deadline:
            if found := self._ended(silence=4 * BEAT):
                raise ProcessDied(f"{found} {self.last_words()}".strip()) from None
            time.sleep(BEAT / 4)

    def _run(self) -> None:
        """In a thread: gives signs of life, and on the first process looks for those of the others."""
        count = 0
        while not self._closed.wait(BEAT):
            count += 1
            try:
                self._store.set(f"alive/{self.process.process_index}", str(count))
                found = self._ended(SILENCE) if self.process.is_main_process else None
            except RuntimeError:
                if self._closed.is_set():
                    return
                # The first process has gone, and with it the run.
                os._exit(1)
            if found:
                # Leaves the main thread, which may be about to say the same, the first word.
                time.sleep(2 * BEAT)
                if not self._closed.is_set():
                    print(f"sae_accel: {found} {self.last_words()}", file=sys.stderr, flush=True)
                    os._exit(1)

    def _ended(self, silence: float) -> str | None:
        """Which process has ended, and why, in words; None if all are well."""
        now = time.monotonic()
        for index in range(1, self.process.num_processes):
            if self._store.check([f"ended/{index}"]):
                return f"Process {index} ended: {self._store.get(f'ended/{index}').decode()}."
            if self._store.check([f"closed/{index}"]):
                continue
            key = f"alive/{index}"
            beat = self._store.get(key) if self._store.check([key]) else b"0"
            if index not in self._beats or self._beats[index][0] != beat:
                self._beats[index] = (beat, now)
            elif now - self._beats[index][1] > silence:
                return f"Process {index} has died without a word: it was killed, or its machine is gone."
        return None


class ProcessDied(RuntimeError):
    """Another process of the run has ended, so that this one cannot go on."""

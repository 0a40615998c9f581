"""What the processes of one run owe each other before and around training: agreement and order."""

import atexit
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TypeVar, cast

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from ..common.errors import InputError


T = TypeVar("T")
S = TypeVar("S")


def this_process() -> PartialState:
    """This process among others. Made without the flag, it would be alone wherever Accelerate is told to use CPUs."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def say(message: object) -> None:
    """Prints one line for all processes on standard error."""
    if this_process().is_main_process:
        print(f"sae_accel: {message}", file=sys.stderr)


def raise_together(work: Callable[[], T]) -> T:
    """
    What `work` gives on this process, once every process has done its own.

    Raises:
        `InputError`: on all processes if it was raised on one, with the message of the first of those.
    """
    result, _ = gather_together(work, lambda _: None)
    return result


def gather_together(work: Callable[[], T], told: Callable[[T], S]) -> tuple[T, list[S]]:
    """
    What `work` gives on this process, and what `told` makes of it on each.

    Raises:
        `InputError`: on all processes if `work` raised it on one, with the message of the first of those.
    """
    if this_process().num_processes == 1:
        result = work()
        return result, [told(result)]
    own: T | None = None
    refusal: InputError | None = None
    try:
        own = work()
    except InputError as error:
        refusal = error
    everyone = gather_objects((refusal and str(refusal), None if refusal else told(cast(T, own))))
    first = next((message for message, _ in everyone if message is not None), None)
    if first is not None:
        raise refusal if refusal is not None and str(refusal) == first else InputError(first)
    return cast(T, own), [cast(S, one) for _, one in everyone]


def gather_objects(value: T) -> list[T]:
    """`value` of each process, on every process, however long the slowest takes."""
    process = this_process()
    values = [value] * process.num_processes
    if process.num_processes > 1:
        dist.all_gather_object(values, value, group=_patient_group())
    return values


def gather_to_main(part: Tensor) -> list[Tensor] | None:
    """
    Each process's `part`, on the CPU of the main process; None on the others. No device holds more than its own.

    Args:
        part (`torch.Tensor`): Of one dtype on all processes, and of one size but in its first dimension.
    """
    process = this_process()
    own = part.detach().cpu().contiguous()
    lengths = gather_objects(len(own))
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
    result = raise_together(work if first else lambda: None)
    return raise_together((lambda: cast(T, result)) if first else work)


@cache
def _patient_group() -> dist.ProcessGroup:
    """Processes that wait for each other as long as it takes: tokenisation may last for hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


@atexit.register
def _end_processes() -> None:
    """Else a thread of the group that outlives the interpreter now and then aborts a process whose work is done."""
    if dist.is_initialized():
        dist.destroy_process_group()

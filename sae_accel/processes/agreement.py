"""
How the processes of a run agree, and in which order they work.

If one process raises an error while the others go on, the others wait for it forever. Therefore each step that can
fail runs in `raise_together`: all processes do their part, exchange the outcome, and raise the same error if one
failed. The exchanges use a process group of their own on CPUs, which waits for days: tokenisation may take hours.
"""

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
    """The state of this process among the others of its run."""
    # Without the flag, Accelerate on CPUs takes each process as alone.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def say(message: object) -> None:
    """Prints one line on standard error, from the main process only."""
    if this_process().is_main_process:
        print(f"sae_accel: {message}", file=sys.stderr)


def raise_together(work: Callable[[], T]) -> T:
    """
    Returns the result of `work` on this process, after every process has run its own.

    Raises:
        `InputError`: on all processes if one raised it, with the message of the first that did.
    """
    result, _ = gather_together(work, lambda _: None)
    return result


def gather_together(work: Callable[[], T], told: Callable[[T], S]) -> tuple[T, list[S]]:
    """
    Returns the result of `work` on this process, and `told(result)` of each process.

    Raises:
        `InputError`: on all processes if `work` raised it on one, with the message of the first that did.
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
    """Returns the `value` of each process, on every process; it waits for the slowest as long as needed."""
    process = this_process()
    values = [value] * process.num_processes
    if process.num_processes > 1:
        dist.all_gather_object(values, value, group=_patient_group())
    return values


def gather_to_main(part: Tensor) -> list[Tensor] | None:
    """
    Collects the `part` of each process in the CPU memory of the main process; no device needs memory for it.

    Args:
        part (`torch.Tensor` of shape `(own length, ...)`): This process's part. All parts have the same dtype and,
            except in the first dimension, the same shape.

    Returns:
        `list[torch.Tensor]` on the main process, None on the others.
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
    Runs `work` on one process of each machine first, so that the other processes find its result in a cache.

    Args:
        work (`Callable`): The work, with a cache of its own.
        task (`str`): Words for the work, which follow "wait for" in the printed line.

    Returns:
        The result of `work`.
    """
    process = this_process()
    if process.num_processes == 1:
        return work()
    first = process.is_local_main_process
    if process.local_process_index == 1:
        print(f"sae_accel: The other processes of this machine wait for {task} by the first process.", file=sys.stderr)
    result = raise_together(work if first else lambda: None)
    return raise_together((lambda: cast(T, result)) if first else work)


@cache
def _patient_group() -> dist.ProcessGroup:
    """A process group whose members wait for each other for days, since tokenisation may take hours."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


@atexit.register
def _end_processes() -> None:
    """Destroys the process group, whose thread otherwise sometimes aborts a finished process at its exit."""
    if dist.is_initialized():
        dist.destroy_process_group()

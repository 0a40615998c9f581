"""Sends signals to commands at chosen moments. Each command runs in a fork of the test, so that it imports nothing."""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

from sae_accel.train import main


def at(moment: str, act: Callable[[], None], call: int = 1) -> Callable[[], None]:
    """Returns a patch: the function at `moment` (`module:name`) calls `act` first, at its `call`-th call alone."""
    name, attribute = moment.split(":")
    place = import_module(f"sae_accel.{name}")
    *owners, last = attribute.split(".")
    for owner in owners:
        place = getattr(place, owner)
    original, calls = getattr(place, last), []

    def patched(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            act()
        return original(*arguments, **options)

    return partial(setattr, place, last, patched)


def send(*numbers: int, wait: float = 0.0) -> None:
    """Sends signals to this process, 1.2 s apart, and then sleeps for `wait` seconds."""
    for i, number in enumerate(numbers):
        if i:
            time.sleep(1.2)
        os.kill(os.getpid(), number)
        # Time for the thread that reads signals.
        time.sleep(0.2)
    time.sleep(wait)


def run(words: list[str], folder: Path, before: Callable[[], object] = lambda: None, command=main) -> tuple[int, str]:
    """Runs a command in a fork. Returns its status and its lines on standard error."""
    said = folder / "said.txt"
    child = os.fork()
    if not child:
        status = 70
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            before()
            # A command answers signals only if it owns its process.
            sys.argv = ["sae_accel", *words]
            status = command()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()


def lines_of_ours(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("sae_accel:")]

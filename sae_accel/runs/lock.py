"""One run at a time in a folder."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

from ..common.errors import InputError
from ..common.signals import signals
from ..processes.agreement import raise_together, say, this_process
from .room import made, write_errors


try:
    import fcntl
except ImportError:
    # On Windows the owner that is written in the file is all that tells.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# Seconds for who has taken it to write down who it is.
_TO_WRITE = 3.0
# Folders that this process holds: who asks for one again has it.
_HELD: set[Path] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    While open, no other process can open the same folder. The lock goes with the process that holds it, whatever
    ends that. A folder that is made for it and stays empty goes too.

    Args:
        folder (`Path`): A run's output folder.

    Raises:
        `InputError`: if another process holds it, with host and number of that; or the folder cannot be written to.
    """
    key = folder.resolve()
    if key in _HELD:
        yield
        return
    with made(folder):
        with write_errors(folder):
            handle = _take(folder / LOCK)
        _HELD.add(key)

        def clear() -> None:
            (key / LOCK).unlink(missing_ok=True)

        try:
            with signals.undone(clear):
                yield
        finally:
            _HELD.discard(key)
            # Before it is let go, so that nobody takes a file that is about to go.
            clear()
            os.close(handle)


@contextmanager
def locked_together(folder: Path) -> Iterator[None]:
    """
    As `locked`, on every process of a run, the first of which holds the lock.

    Raises:
        `InputError`: on all processes, as of `locked`.
    """
    with ExitStack() as stack:

        def take() -> None:
            if this_process().is_main_process:
                stack.enter_context(locked(folder))

        raise_together(take)
        yield


def _take(file: Path) -> int:
    while True:
        # Not `w`, which would wipe out who owns it.
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            supported = _lock(handle, file)
            owner = _owner(handle)
            if not supported and owner and not _is_gone(owner):
                _refuse(file, owner, is_alive=False)
            if not _is_still_there(file, handle):
                # Its owner deleted it while this process waited for it.
                os.close(handle)
                continue
            if owner:
                say(f"{_in_words(owner)} did not end well in {str(file.parent)!r}. This run takes over.")
            _write_owner(handle)
            return handle
        except BaseException:
            os.close(handle)
            raise


def _lock(handle: int, file: Path) -> bool:
    """Takes the lock of an open file; whether its file system knows locks."""
    if fcntl is None:
        return False
    try:
        # Not `flock`, which processes that are forked from this one would go on to hold.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        deadline = time.monotonic() + _TO_WRITE
        while not (owner := _owner(handle)) and time.monotonic() < deadline:
            # It has taken the lock, and is about to say who it is.
            time.sleep(0.1)
        _refuse(file, owner, is_alive=True)
    except OSError:
        return False
    return True


def _refuse(file: Path, owner: dict[str, Any], is_alive: bool) -> NoReturn:
    surely = is_alive or owner.get("host") == socket.gethostname()
    by_hand = "" if surely else f" If it is gone for good, delete {str(file)!r}."
    raise InputError(
        f"training.output_dir: {_in_words(owner)} is at work in {str(file.parent)!r}, and one run at a time can be. "
        f"Wait until it has ended, or set another training.output_dir.{by_hand}"
    )


def _owner(handle: int) -> dict[str, Any]:
    """Who wrote the file; nothing if nobody did, or was killed before."""
    try:
        owner = json.loads(os.pread(handle, 10_000, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _write_owner(handle: int) -> None:
    own = psutil.Process()
    owner = {"host": socket.gethostname(), "process": own.pid, "started": own.create_time()}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(owner).encode(), 0)


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; of another machine's nothing is known."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        # Numbers of processes are given again.
        return psutil.Process(owner["process"]).create_time() != owner["started"]
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True


def _is_still_there(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _in_words(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process', '?')} on {owner.get('host', '?')}" if owner else "another run"

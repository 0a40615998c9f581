"""
A lock, so that only one run at a time works in an output folder.

The lock is the operating system's lock on the file `.lock`; it ends with the process, even after a kill. The file also
holds host, process id and start time of its owner, for the error message, and for file systems without locks: there a
lock counts until its owner is known to have ended.
"""

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
    # Windows has no `fcntl`; there the owner in the file decides.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# Seconds that a new owner has to write its name into the file.
_TO_WRITE = 3.0
# Folders that this process has locked already; locking one again does nothing.
_HELD: set[Path] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Locks a folder while this is open. The lock ends with the process, however the process ends. A folder that was made
    for the lock and is still empty at the end is removed.

    Args:
        folder (`Path`): A run's output folder.

    Raises:
        `InputError`: if another process holds the lock, with its host and id; or if the folder cannot be written to.
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
            # Deleted before the lock ends, so that nobody locks a file that is about to disappear.
            clear()
            os.close(handle)


@contextmanager
def locked_together(folder: Path) -> Iterator[None]:
    """
    Locks a folder for all processes of a run; the main process holds the lock. Every process must call it.

    Raises:
        `InputError`: on all processes, if `locked` raises it.
    """
    with ExitStack() as stack:

        def take() -> None:
            if this_process().is_main_process:
                stack.enter_context(locked(folder))

        raise_together(take)
        yield


def _take(file: Path) -> int:
    while True:
        # Not with mode `w`, which would erase the owner.
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            supported = _lock(handle, file)
            owner = _owner(handle)
            if not supported and owner and not _is_gone(owner):
                _refuse(file, owner, is_alive=False)
            if not _is_still_there(file, handle):
                # The owner deleted the file while this process waited for the lock: try again.
                os.close(handle)
                continue
            if owner:
                say(f"In {str(file.parent)!r}, {_in_words(owner)} has ended without a clean end. This run takes over.")
            _write_owner(handle)
            return handle
        except BaseException:
            os.close(handle)
            raise


def _lock(handle: int, file: Path) -> bool:
    """Locks an open file. Returns whether its file system supports locks."""
    if fcntl is None:
        return False
    try:
        # Not `flock`: forked children would keep holding its lock.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        deadline = time.monotonic() + _TO_WRITE
        while not (owner := _owner(handle)) and time.monotonic() < deadline:
            # The new owner has the lock, and is about to write its name.
            time.sleep(0.1)
        _refuse(file, owner, is_alive=True)
    except OSError:
        return False
    return True


def _refuse(file: Path, owner: dict[str, Any], is_alive: bool) -> NoReturn:
    surely = is_alive or owner.get("host") == socket.gethostname()
    by_hand = "" if surely else f" If that process has ended, delete {str(file)!r}."
    raise InputError(
        f"training.output_dir: {_in_words(owner)} is at work in {str(file.parent)!r}, which takes one run at a time. "
        f"Wait for its end, or set another training.output_dir.{by_hand}"
    )


def _owner(handle: int) -> dict[str, Any]:
    """Reads the owner from the file; empty if nobody has written one."""
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
    """Whether the owner is known to have ended; False for a process on another machine."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        # The start time, because the system gives the same process id again.
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

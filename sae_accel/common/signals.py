"""
Ends a command in good order after Ctrl-C, SIGTERM, SIGHUP, a closed pipe, or the death of its launcher.

The user always gets one line that says what is saved. Python answers signals only in its main thread, between two
steps, and an import or a collective can hold that thread for minutes. So a second thread reads the signals from a
socket, and ends the process at once. While a run trains, it defers the end: the thread only notes the signal, and the
run saves a checkpoint after its step. This module is imported first, so it imports nothing slow.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import FrameType
from typing import TextIO, cast


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Means that the reader of a pipe, such as `| head`, has gone. Python ignores the signal itself, so none arrives.
CLOSED_PIPE = 13
# The line after a first signal, for a terminal and for a run from Python.
SAVING = "Saving a checkpoint, then stopping. A second Ctrl-C stops at once"
NOTHING_SAVED = "Nothing was saved yet: start again with the same command."
# One Ctrl-C can arrive twice within this time: from the terminal and from the launcher.
SAME_SECONDS = 1.0
# When a launcher dies its processes go on. They have this long to save.
ORPHAN_SECONDS = 25.0
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class Stopped(KeyboardInterrupt):
    """
    Raised when a signal has ended a run in good order.

    Args:
        number (`int`): The signal; `CLOSED_PIPE` for a closed pipe.
        message (`str`): One line that says what is saved.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 128 + number


class Signals:
    """
    Answers Ctrl-C, SIGTERM, SIGHUP, a closed pipe, and the death of a launcher.

    By default the process prints one line and ends at once. While `is_deferred`, the first signal is only noted in
    `number`, and the run that has something to save looks there. Then only a second Ctrl-C ends at once: launchers
    send several SIGTERM.

    Attributes:
        number (`int`, *optional*): The first signal that came.
        words (`Callable[[], str]`): Returns a sentence about the saved files and how to go on.
        is_active (`bool`): Whether a command runs.
        is_deferred (`bool`): Whether a run looks at `number`, so that the process need not end at once.
        leave (`Callable[[int], None]`): Ends this process at once; on several processes, all of them.
    """

    def __init__(self) -> None:
        self.is_active = False
        self._undo: list[Callable[[], object]] = []
        self._begin()

    def _begin(self) -> None:
        self.number: int | None = None
        self.is_deferred = False
        self.words: Callable[[], str] = lambda: NOTHING_SAVED
        self.leave: Callable[[int], None] = self.end
        self._first = 0.0
        self._orphan_since: float | None = None

    def command(self, work: Callable[[], int], owns_process: bool) -> int:
        """
        Runs a command and returns its status.

        Args:
            work (`Callable[[], int]`): The command.
            owns_process (`bool`): Whether the process exists for this command alone. Only then are its signals
                answered; otherwise they belong to the caller.
        """
        if not owns_process or self.is_active or threading.current_thread() is not threading.main_thread():
            # Only the main thread can receive signals.
            return self._status(work)
        self._begin()
        numbers = self._answer()
        try:
            return self._status(work)
        finally:
            # The command has ended. A later signal, while Python shuts down, must not change the status.
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)

    def _status(self, work: Callable[[], int]) -> int:
        try:
            return work()
        except KeyboardInterrupt as interrupt:
            # Raised by Python's own handler, or by a library that the command calls.
            message = interrupt if isinstance(interrupt, Stopped) else f"Stopped. {self.words()}"
            tell(message)
            return interrupt.status if isinstance(interrupt, Stopped) else 128 + signal.SIGINT

    def _answer(self) -> list[signal.Signals]:
        """Answers signals from now to the end of the process. Returns the signals that are answered."""
        receiver, self._sender = socket.socketpair()
        receiver.settimeout(SAME_SECONDS)
        self._sender.setblocking(False)
        # nohup sets SIGHUP to be ignored, and it stays ignored.
        numbers = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        gone = partial(self._received, CLOSED_PIPE)
        sys.stdout, sys.stderr = _guarded(sys.stdout, gone), _guarded(sys.stderr, gone)
        self.is_active = True
        _reset_children()
        threading.Thread(target=self._read, args=(receiver, _launcher()), daemon=True).start()
        for number in numbers:
            signal.signal(number, _nothing)
        signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        return numbers

    @contextmanager
    def undone(self, undo: Callable[[], object]) -> Iterator[None]:
        """While open, a process that ends at once calls `undo` first."""
        self._undo.append(undo)
        try:
            yield
        finally:
            self._undo.remove(undo)

    def end(self, number: int, speaks: bool | None = None) -> None:
        """
        Ends this process and its children, with one line.

        Args:
            number (`int`): The signal.
            speaks (`bool`, *optional*): Whether this process prints the line. If not given, the first process of the
                launch does.
        """
        try:
            if is_first() if speaks is None else speaks:
                _say(f"{self.reason(number)} {self.words()}")
            _end_children()
            for undo in reversed(self._undo):
                with suppress(OSError):
                    undo()
        finally:
            os._exit(128 + number)

    def reason(self, number: int) -> str:
        """A sentence that names the signal, or the death of the launcher."""
        if self._orphan_since is not None:
            return "Stopped, because the launcher has died."
        return f"Stopped by {'a closed pipe' if number == CLOSED_PIPE else signal.Signals(number).name}."

    def _received(self, number: int) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._first = number, now
            if not self.is_deferred:
                self.leave(number)
            elif sys.stderr.isatty():
                _say(f"{SAVING}; a second SIGTERM does not.")
        elif number == signal.SIGINT and now - self._first > SAME_SECONDS:
            self.leave(self.number)

    def _read(self, receiver: socket.socket, launcher: int | None) -> None:
        """Runs in the thread: receives the numbers of signals, and checks in between whether the launcher lives."""
        while self.is_active:
            with suppress(TimeoutError):
                for number in receiver.recv(64):
                    if number in SIGNALS:
                        self._received(number)
            if launcher is not None and os.getppid() != launcher:
                self._orphaned()

    def _orphaned(self) -> None:
        now = time.monotonic()
        if self._orphan_since is None:
            self._orphan_since = now
            self._received(signal.SIGTERM)
        elif self.number is not None and now - self._orphan_since > ORPHAN_SECONDS:
            self.leave(self.number)


class _Guarded:
    """A stream whose reader may go away. Text that is written later is dropped."""

    def __init__(self, stream: TextIO, gone: Callable[[], None]):
        self._stream, self._gone = stream, gone
        self.is_line_open = False

    def write(self, text: str) -> int:
        self.is_line_open = bool(text) and not text.endswith("\n")
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._lose()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _lose(self) -> None:
        # Otherwise Python would try at exit to write the text that the stream still holds.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._gone()


def _guarded(stream: TextIO, gone: Callable[[], None]) -> TextIO:
    if stream is None:
        # The stream was closed before Python started.
        return stream
    if reconfigure := getattr(stream, "reconfigure", None):
        # Each line is written at once: none is lost at a sudden end, and a reader that has gone is noticed.
        reconfigure(line_buffering=True)
        if getattr(stream, "errors", None) == "strict":
            # A character that the terminal cannot show must not end the command.
            with suppress(OSError):
                reconfigure(errors="backslashreplace")
    return cast(TextIO, _Guarded(stream, gone))


def _launcher() -> int | None:
    """The launcher of this process, if it is part of a launch. A shell is none: it may end, and the run goes on."""
    return os.getppid() if any(name in os.environ for name in _LAUNCHED) else None


def _nothing(number: int, frame: FrameType | None) -> None:
    """Does nothing, since the thread answers."""


def is_first() -> bool:
    """Whether this is the first process of a launch, by the launcher's environment variables."""
    return os.environ.get("RANK", "0") == "0"


def tell(message: object, by_any: bool = False) -> None:
    """
    Prints one line on standard error, below a progress bar that is open.

    Args:
        message (`object`): The line.
        by_any (`bool`, defaults to `False`): Whether every process prints it, and not the first of a launch alone.
    """
    if by_any or is_first():
        print(_line(message), file=sys.stderr)


def _say(message: str) -> None:
    # Not through sys.stderr, which the main thread may hold in the middle of a write.
    with suppress(OSError):
        os.write(2, f"{_line(message)}\n".encode())


def _line(message: object) -> str:
    """A message as a line, after a line break if a progress bar has left its line open."""
    is_open = isinstance(sys.stderr, _Guarded) and sys.stderr.is_line_open
    return f"{chr(10) if is_open else ''}sae_accel: {message}"


def _end_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


@cache
def _reset_children() -> None:
    """Makes forked processes, such as those that tokenise, end silently by a signal, as any process does."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_reset)


def _reset() -> None:
    if signals.is_active:
        signals.is_active = False
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _nothing:
                signal.signal(number, signal.SIG_DFL)


signals = Signals()

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from accelerate.logging import get_logger
from torch.optim import Optimizer

from ..common.signals import SIGNALS, signals
from ..processes.agreement import gather_objects


T = TypeVar("T")
logger = get_logger(__name__)
Handler = Callable[[int, FrameType | None], Any] | int | None


class Abandoned(Exception):
    """A process was signalled, so that all leave what they are at. What was whole before is so still."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Interruption:
    """
    While open, the first Ctrl-C, SIGTERM or SIGHUP is noted, so that a checkpoint can be saved. In a command
    [`Signals`] does that; elsewhere a second Ctrl-C raises a `KeyboardInterrupt`, but not a second SIGTERM, since
    launchers send several. Outside the main thread, which alone receives signals, it does nothing.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._is_open = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "Interruption":
        self._is_open = signals.is_deferred = True
        self._number = None
        if not signals.is_active and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._is_open = signals.is_deferred = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and (late := self._noted()) is not None:
            # It came when nobody looked any more, and nothing is left to save here.
            if signals.is_active:
                signals.leave(late)
            raise KeyboardInterrupt

    def check(self) -> None:
        """
        Looks whether to go on.

        Raises:
            `Abandoned`: on every process, if one was signalled.
        """
        if not self._is_open:
            return
        noted = next((number for number in gather_objects(self._noted()) if number is not None), None)
        if noted is not None:
            raise Abandoned(noted)

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """Batches, as many on every process, with a `check` before each."""
        for batch in batches:
            self.check()
            yield batch

    @contextmanager
    def whole_step(self, optimizer: Optimizer) -> Iterator[None]:
        """An optimizer step that leaves no trace if it is abandoned between the batches of its window."""
        try:
            yield
        except Abandoned:
            optimizer.zero_grad()
            raise

    def _noted(self) -> int | None:
        return signals.number if signals.is_active else self._number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number if self._number is None else self._number
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        logger.warning("Stopping, and saving a checkpoint. Ctrl-C once more stops at once.")

"""
How a signal (Ctrl-C, SIGTERM, SIGHUP) stops a run in good order.

The handler only notes the signal. At fixed points, between steps and between the batches of a step, all processes
ask each other whether one noted a signal; then all leave together, and the trainer saves a checkpoint.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from accelerate.logging import get_logger
from torch.optim import Optimizer

from ..common.signals import SAVING, SIGNALS, signals
from ..processes.agreement import gather_objects


T = TypeVar("T")
logger = get_logger(__name__)
Handler = Callable[[int, FrameType | None], Any] | int | None


class Abandoned(Exception):
    """Raised on all processes when one got a signal: each leaves its present work, and no state is half changed."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Interruption:
    """
    While open, it notes the first Ctrl-C, SIGTERM or SIGHUP, so that the run can save a checkpoint and then stop. In a
    command [`Signals`] notes them; elsewhere this class does. A second Ctrl-C raises `KeyboardInterrupt`, a second
    SIGTERM does not, since launchers send several. In other threads than the main one, which alone gets signals, it
    does nothing.
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
            # The signal came after the last check, when everything was saved already.
            if signals.is_active:
                signals.leave(late)
            raise KeyboardInterrupt

    def check(self) -> None:
        """
        Checks on all processes whether one got a signal.

        Raises:
            `Abandoned`: on every process, if one got a signal.
        """
        if not self._is_open:
            return
        noted = next((number for number in gather_objects(self._noted()) if number is not None), None)
        if noted is not None:
            raise Abandoned(noted)

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields batches with a `check` before each. Every process must have the same number of batches."""
        for batch in batches:
            self.check()
            yield batch

    @contextmanager
    def whole_step(self, optimizer: Optimizer) -> Iterator[None]:
        """While open, an optimizer step runs; if a signal ends it between two batches, its gradients are cleared."""
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
        logger.warning(f"{SAVING}.")

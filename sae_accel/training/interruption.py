import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from accelerate.logging import get_logger


logger = get_logger(__name__)
Handler = Callable[[int, FrameType | None], Any] | int | None
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """
    While open, the first Ctrl-C or SIGTERM sets `requested`, so that a step can end and a checkpoint be saved; a
    second Ctrl-C stops at once, but not a second SIGTERM, since launchers send several. Outside the main thread,
    which alone receives signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        logger.warning("Stopping after this step, and saving a checkpoint. Once more to stop at once.")

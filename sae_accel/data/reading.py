"""What `datasets` raises where data cannot be read, in one line."""

import logging
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..common.errors import InputError, one_line


# It passes on whatever its builders and decompressors raise; these are what wrong arguments and files cause.
_RAISED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, DatasetGenerationError, DatasetNotFoundError),
    *(zlib.error, lzma.LZMAError),
)
# They say on the screen which file it was, and raise without it.
_LOGGERS = [f"datasets.packaged_modules.{name}.{name}" for name in ("arrow", "csv", "json", "parquet", "text")]


@contextmanager
def reading(begins: str, ends: str = "") -> Iterator[None]:
    """
    While open, what cannot be read is refused with the reason.

    Args:
        begins (`str`): What the line says before the reason.
        ends (`str`, defaults to `""`): What it says after it, as sentences that follow on a full stop.

    Raises:
        `InputError`: if something cannot be read.
    """
    told = _Told()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(told)
    try:
        yield
    except InputError:
        raise
    except _RAISED as error:
        reason = told.last or one_line(error.__cause__ or error)
        raise InputError(f"{begins}: {reason.rstrip('.')}.{ends and f' {ends}'}") from error
    finally:
        for logger in loggers:
            logger.removeFilter(told)


class _Told(logging.Filter):
    """Keeps errors off the screen, and the last of them for the line."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        self.last = one_line(record.getMessage())
        return False

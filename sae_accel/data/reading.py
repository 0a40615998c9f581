"""What `datasets` raises where data cannot be read, in one line."""

import logging
import lzma
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..common.errors import InputError, one_line
from ..common.hub_answers import answer_behind, clause, needs_token
from ..common.hub_requests import HubFailed


# It passes on whatever its builders and decompressors raise; these are what wrong arguments and files cause.
_RAISED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, DatasetGenerationError, DatasetNotFoundError),
    *(zlib.error, lzma.LZMAError),
)
# They say on the screen what they raise as well.
_LOGGERS = [f"datasets.packaged_modules.{name}.{name}" for name in ("arrow", "csv", "json", "parquet", "text")]


_BUILDERS_AT_WORK = ("_generate_tables", "_split_generators")


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
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_no_error)
    try:
        yield
    except HubFailed as error:
        raise InputError(f"{begins}: {error}. Try again later.") from error
    except InputError:
        raise
    except _RAISED as error:
        if (answer := answer_behind(error)) is not None:
            token = " Set data.load_args.token, or run `hf auth login`." if needs_token(answer) else ""
            raise InputError(f"{begins}: {clause(answer)}.{token}{ends and f' {ends}'}") from error
        # It wraps what happens while it writes its cache.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = _with_file(cause or error).rstrip(".")
        raise InputError(f"{begins}: {reason}.{ends and f' {ends}'}") from error
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _with_file(error: BaseException) -> str:
    """What an error says, after the file that a builder was at when it came."""
    reason = one_line(error)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_locals.get("file") if frame.f_code.co_name in _BUILDERS_AT_WORK else None
        if isinstance(file, str) and file not in reason:
            return f"{file}: {reason}"
    return reason

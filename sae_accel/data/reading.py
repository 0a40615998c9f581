"""
Turns an error of `datasets` into one line that says which data cannot be read, and why.

`datasets` passes on the errors of its builders and decompressors. The line names the file that was being read and the
Hub's answer, where there is one.
"""

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


# `datasets` passes on every error of its builders and decompressors; wrong arguments and files cause these.
_RAISED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, DatasetGenerationError, DatasetNotFoundError),
    *(zlib.error, lzma.LZMAError),
)
# These loggers would print the same error a second time.
_LOGGERS = [f"datasets.packaged_modules.{name}.{name}" for name in ("arrow", "csv", "json", "parquet", "text")]


_BUILDERS_AT_WORK = ("_generate_tables", "_split_generators")


@contextmanager
def reading(begins: str, ends: str = "") -> Iterator[None]:
    """
    Turns errors while the data is read into one-line errors.

    Args:
        begins (`str`): Words of the line before the reason.
        ends (`str`, defaults to `""`): Sentences of the line after the reason.

    Raises:
        `InputError`: if the data cannot be read.
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
        # `datasets` wraps an error that comes while it writes its cache.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = _with_file(cause or error).rstrip(".")
        raise InputError(f"{begins}: {reason}.{ends and f' {ends}'}") from error
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _with_file(error: BaseException) -> str:
    """Returns the message of an error, after the file that a builder was reading."""
    reason = one_line(error)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_locals.get("file") if frame.f_code.co_name in _BUILDERS_AT_WORK else None
        if isinstance(file, str) and file not in reason:
            return f"{file}: {reason}"
    return reason

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as client_logging

from ..common.errors import AGAIN, InputError, one_line


_LOG_IN = "Run `hf auth login`, set HF_TOKEN, or give token."


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hub into one line with the Hub's own reason."""
    # The client would say of a release that was there already what is said here as well.
    said = client_logging.get_verbosity()
    client_logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except LocalTokenNotFoundError as error:
        raise InputError(f"{repo_id!r} cannot be pushed to without a token. {_LOG_IN}") from error
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        reason = f"{repo_id!r} cannot be pushed to: {_reason(error).rstrip('.')}."
        raise InputError(f"{reason} {_advice(error)}".rstrip()) from error
    finally:
        client_logging.set_verbosity(said)


def _advice(error: BaseException) -> str:
    cause = _cause(error)
    response = cause.response if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE."
    if response is not None and response.status_code == 401:
        return _LOG_IN
    # With 412 the Hub says that somebody else's commit came first.
    is_busy = response is None or response.status_code in (412, 429) or response.status_code >= 500
    # A ValueError is the client's own: of a name that no repo can have, for one.
    return AGAIN if is_busy and not isinstance(cause, ValueError) else ""


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    said = str(error) if cause is error else f"{error} {cause}"
    return re.sub(r"For more information check: \S+ ?", "", one_line(said)) or type(error).__name__


def _cause(error: BaseException) -> BaseException:
    # The client's own line for a file that failed says nothing of why.
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error

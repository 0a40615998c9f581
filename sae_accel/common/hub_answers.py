"""What the Hub's refusals mean, each in a clause of this package."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import ModelInfo
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import InputError, one_line
from .hub_requests import HubFailed, NoConnection


HOW_TO_LOG_IN = "Run `hf auth login`, set HF_TOKEN, or give token."
# What a call of the Hub's client may end in, those that an answer which is not the Hub's runs it into among them.
EXPECTED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, HTTPError)
COMMIT = re.compile("[0-9a-f]{40}")
_NO_HUB = "what answers there is not the Hub: look at HF_ENDPOINT, and for a proxy or a login page in between"
_BY_STATUS = {
    401: "the token is not valid",
    403: "the token does not allow it",
    404: "it is not there",
    409: "it is there already, or is being changed",
    412: "somebody else has committed since",
    413: "it is too large for the Hub",
}


class AccessRefused(InputError):
    """
    A repo is private, gated or missing, which the Hub does not tell apart for those who give no token.

    Args:
        reason (`str`): One line, without what to do.
    """

    def __init__(self, reason: str):
        super().__init__(f"{reason} {HOW_TO_LOG_IN}")
        self.reason = reason


class Unreachable(Exception):
    """There is no connection to the Hub, or none is to be made."""


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """
    Tells of what goes wrong as a repo is read.

    Args:
        name (`str`): The repo.

    Raises:
        `Unreachable`: if there is no connection to the Hub, or none is to be made.
        `InputError`: if the Hub refuses or fails, with the reason in one line.
    """
    try:
        yield
    except HubFailed as error:
        raise InputError(f"{name!r} cannot be read: {error}. Try again later.") from error
    except InputError:
        raise
    except EXPECTED as error:
        cause = cause_of(error)
        if is_unreachable(cause):
            raise Unreachable(clause(cause)) from error
        reason = f"{name!r} cannot be read: {clause(cause)}."
        raise (AccessRefused if needs_token(cause) else InputError)(reason) from error


def cause_of(error: BaseException) -> BaseException:
    """The error itself, or the one before it that the client's own line says nothing of."""
    wraps = type(error) is RuntimeError or isinstance(error, LocalEntryNotFoundError)
    return error.__cause__ if wraps and error.__cause__ is not None else error


def answer_behind(error: BaseException | None) -> BaseException | None:
    """The refusal of the Hub, or the connection that failed, for which others raise errors of their own."""
    while error is not None and not isinstance(error, (HTTPError, OfflineModeIsEnabled, FileMetadataError, HubFailed)):
        error = error.__cause__
    return error


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub was not there to be asked."""
    return isinstance(error, OfflineModeIsEnabled)


def needs_token(error: BaseException) -> bool:
    """Whether a token, or another, might help."""
    return isinstance(error, (RepositoryNotFoundError, GatedRepoError)) or status_of(error) == 401


def status_of(error: BaseException) -> int | None:
    """The status of a refusal of the Hub; None of another error."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def commit_of(info: ModelInfo) -> str:
    """
    The commit that a repo is at.

    Raises:
        `LookupError`: if the answer names none, as no answer of the Hub does.
    """
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise LookupError("the answer names no commit")
    return info.sha


def clause(error: BaseException) -> str:
    """What went wrong, without a full stop."""
    if isinstance(error, GatedRepoError):
        return f"its owner gives access on request, which is asked for on its page{_said(error)}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repo on the Hub, or it is private and no token that opens it was given{_said(error)}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such branch, tag or commit{_said(error)}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"it has no file {error.response.request.url.path.partition('/resolve/')[2].partition('/')[2]!r}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"{_BY_STATUS.get(status, 'the Hub refuses')} (status {status}){_said(error)}"
    if isinstance(error, NoConnection):
        return f"there is {error}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, FileMetadataError):
        return _NO_HUB
    if isinstance(error, HTTPError):
        return f"the connection failed ({one_line(error).rstrip('.') or type(error).__name__})"
    if isinstance(error, HFValidationError) or (isinstance(error, OSError) and error.errno is not None):
        return one_line(error).rstrip(".")
    if isinstance(error, (json.JSONDecodeError, LookupError, TypeError, AttributeError)):
        return _NO_HUB
    return one_line(error).rstrip(".") or type(error).__name__


def _said(error: HfHubHTTPError) -> str:
    """The Hub's own words, if they are words and not a page."""
    words = one_line(error.server_message or "").rstrip(".")
    return f": {words}" if words and len(words) < 300 and not re.search(r"[<>{}]", words) else ""

"""
Turns a refusal of the Hub into a clause that a user understands.

The Hub's client raises errors of many types, often one inside another, with long messages. `answer_behind` finds the
error that holds the Hub's answer, and `clause` says in plain words what it means. A caller puts its own beginning
and advice around the clause, so that the user reads one line.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import ModelInfo, constants
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
# Errors that a call of the Hub's client may raise, also where the answer comes from something other than the Hub.
EXPECTED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, HTTPError)
COMMIT = re.compile("[0-9a-f]{40}")
_NO_HUB = "the answer does not come from the Hub: check HF_ENDPOINT, and look for a proxy or a login page in between"
_BY_STATUS = {
    401: "the token is not valid",
    403: "the token does not allow it",
    404: "it does not exist",
    409: "it exists already, or is being changed",
    412: "somebody else has committed since",
    413: "it is too large for the Hub",
}


class AccessRefused(InputError):
    """
    A repo is private, gated or missing. Without a token, the Hub does not say which of the three.

    Args:
        reason (`str`): One line that gives the reason without advice.
    """

    def __init__(self, reason: str):
        super().__init__(f"{reason} {HOW_TO_LOG_IN}")
        self.reason = reason


class Unreachable(Exception):
    """The Hub cannot be reached, or the user has forbidden connections with HF_HUB_OFFLINE."""


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """
    While open, an error in reading a repo becomes one line.

    Args:
        name (`str`): The repo.

    Raises:
        `Unreachable`: if the Hub cannot be reached, or HF_HUB_OFFLINE is set.
        `InputError`: if the Hub refuses or fails, with the reason in one line.
    """
    try:
        yield
    except HubFailed as error:
        raise InputError(f"{name!r} cannot be read: {error}. Try again later.") from error
    except InputError:
        raise
    except EXPECTED as error:
        cause = answer_behind(error) or error.__cause__ or error
        if is_unreachable(cause):
            raise Unreachable(clause(cause)) from error
        reason = f"{name!r} cannot be read: {clause(cause)}."
        raise (AccessRefused if needs_token(cause) else InputError)(reason) from error


def answer_behind(error: BaseException | None) -> BaseException | None:
    """The Hub's refusal, or the failed connection, that is the cause of an error; None if there is none."""
    while error is not None and not isinstance(error, (HTTPError, OfflineModeIsEnabled, FileMetadataError, HubFailed)):
        if _was_kept_offline(error):
            return OfflineModeIsEnabled()
        error = error.__cause__
    return error


def _was_kept_offline(error: BaseException) -> bool:
    """Whether a library did not ask the Hub because of HF_HUB_OFFLINE; each raises an error of its own then."""
    in_words = OfflineModeIsEnabled.__name__ in str(error)
    return constants.HF_HUB_OFFLINE and (in_words or isinstance(error, LocalEntryNotFoundError))


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub could not be reached, or was not asked because HF_HUB_OFFLINE is set."""
    return isinstance(error, OfflineModeIsEnabled)


def needs_token(error: BaseException) -> bool:
    """Whether a token, or a different one, might help."""
    return isinstance(error, (RepositoryNotFoundError, GatedRepoError)) or status_of(error) == 401


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a refusal of the Hub; None for any other error."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def commit_of(info: ModelInfo) -> str:
    """
    The commit that a repo is at.

    Raises:
        `LookupError`: if the answer names no commit, and so does not come from the Hub.
    """
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise LookupError("the answer names no commit")
    return info.sha


def clause(error: BaseException) -> str:
    """A clause that says what went wrong, without a full stop."""
    if isinstance(error, GatedRepoError):
        return f"its owner gives access on request: ask for it on the repo's page{_said(error)}"
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
    """The Hub's own words after a colon; empty if the answer is a web page."""
    words = one_line(error.server_message or "").rstrip(".")
    return f": {words}" if words and len(words) < 300 and not re.search(r"[<>{}]", words) else ""

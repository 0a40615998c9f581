"""
Turns the errors of a push into one line that names the repo, the reason and the way out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from ..common.errors import AGAIN, InputError, one_line
from ..common.hub_answers import EXPECTED, HOW_TO_LOG_IN, answer_behind, clause, needs_token, status_of
from ..common.hub_requests import HubFailed, NoConnection, hub_requests


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """
    While open, an error of the Hub in a push becomes one line.

    Args:
        repo_id (`str`): The repo to push to.

    Raises:
        `InputError`: if the Hub refuses, fails or cannot be reached.
    """
    try:
        with hub_requests(f"pushing to {repo_id!r}"):
            yield
    except HubFailed as error:
        raise InputError(f"{repo_id!r} cannot be pushed to: {error}. {AGAIN}") from error
    except InputError:
        raise
    except LocalTokenNotFoundError as error:
        raise InputError(f"{repo_id!r} cannot be pushed to without a token. {HOW_TO_LOG_IN}") from error
    except EXPECTED as error:
        cause = answer_behind(error) or error.__cause__ or error
        which = "" if isinstance(cause, type(error)) else f"{one_line(error).rstrip('.')}: "
        reason = f"{repo_id!r} cannot be pushed to: {which}{clause(cause)}."
        raise InputError(f"{reason} {_advice(cause)}".rstrip()) from error


def _advice(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return AGAIN if isinstance(error, NoConnection) else "Unset HF_HUB_OFFLINE."
    if needs_token(error):
        return HOW_TO_LOG_IN
    # Status 412 means that somebody else's commit came first.
    is_busy = status_of(error) in (None, 412, 429)
    # A ValueError comes from the client itself, for example for a name that no repo can have.
    return AGAIN if is_busy and not isinstance(error, ValueError) else ""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import logging as client_logging
from huggingface_hub.utils import validate_repo_id

from .errors import InputError
from .formats.folders import ADAPTER, RUN_FILES
from .model_card import CARD, write_card
from .models.auto import AutoSae, find_heads
from .models.sae_heads import SaeHeads
from .tables import aligned


# What every repo has that was just made, or that says nothing of what is in it.
_EMPTY_REPO = {".gitattributes", CARD, "LICENSE"}
_LOG_IN = "Run `hf auth login`, set HF_TOKEN, or give token."
AGAIN = "Push again to go on: what has arrived is not sent twice."


class Pushed(NamedTuple):
    """
    A release on the Hub.

    Args:
        url (`str`): Of the repo.
        commit (`str`): The commit that holds it.
        is_new (`bool`): Whether there was anything to send.
        left (`tuple[str, ...]`): Heads of the repo that are no part of the release, and that its card does not name.
    """

    url: str
    commit: str
    is_new: bool
    left: tuple[str, ...] = ()

    def about_left(self) -> str:
        """A line, or nothing, about heads that an earlier release put there."""
        if not self.left:
            return ""
        return f"\nHeads that were there, and that the new card does not name, were left: {', '.join(self.left)}."


class Release:
    """
    The heads of a folder as they go to the Hub: their configs and weights, the card, the recipe, metrics, and a LoRA
    that was trained around them. Checkpoints, logs and optimizer states stay.

    Args:
        folder (`str` or `Path`): A run's folder, or another with heads in our layout.
        repo_id (`str`): Where to: `name` or `user/name`.
        include (`Sequence[str]`): Globs over the names of heads; all if not given.
        license (`str`, *optional*): The Hub's identifier of a license, for the card.

    Raises:
        `InputError`: if there is no head in the folder, or a glob matches none.
    """

    def __init__(self, folder: str | Path, repo_id: str, include: Sequence[str] = (), license: str | None = None):
        self.folder, self.repo_id = Path(folder), repo_id
        self.include, self.license = list(include), license
        if not self.folder.is_dir():
            raise InputError(f"There is no folder {str(folder)!r}.")
        with pushing(repo_id):
            validate_repo_id(repo_id)
        self.heads = _heads(self.folder, self.include)
        self.files = _files(self.folder, self.heads)

    def table(self) -> str:
        """One line a file, with its size, and the sum."""
        with tempfile.TemporaryDirectory() as place:
            files = self.files | _card(self, self.repo_id, Path(place))
            sizes = {name: path.stat().st_size for name, path in files.items()}
        rows = [(name, f"{size:,}") for name, size in sizes.items()]
        return "\n".join(aligned([("file", "bytes"), *rows, ("in all", f"{sum(sizes.values()):,}")]))

    def push(
        self,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        message: str = "Upload heads",
        extra: dict[str, Path] | None = None,
    ) -> Pushed:
        """
        Sends all of it in one commit, and of that only what the repo does not have. Until the commit the repo stays as
        it was, so that a push that was interrupted can be run again.

        Args:
            private (`bool`, *optional*): Whether a repo that is made for it is private; the namespace's default if not
                given.
            revision (`str`, *optional*): Branch to commit to, made if there is none; the main one if not given.
            token (`str`, *optional*): Hub token; the stored login if not given.
            message (`str`, *optional*): Of the commit.
            extra (`dict[str, Path]`, *optional*): Further files, by their path in the repo.

        Raises:
            `InputError`: if the Hub refuses, with its reason, cannot be reached, or the repo holds something else.
        """
        api = HfApi(token=token)
        repo_id = open_repo(self.repo_id, private=private, token=token)
        with tempfile.TemporaryDirectory() as place, pushing(repo_id):
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            before = api.model_info(repo_id, revision=revision).sha
            there = find_heads(api.list_repo_files(repo_id, revision=revision), repo_id)
            files = self.files | _card(self, repo_id, Path(place)) | (extra or {})
            operations = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        left = tuple(name for name in there if name not in self.heads)
        return Pushed(str(commit.repo_url), commit.oid, commit.oid != before, left)


def open_repo(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """
    Makes a repo for heads if there is none, and gives its name with its namespace.

    Raises:
        `InputError`: if the Hub refuses, with its reason, cannot be reached, or the name is taken by something else.
    """
    api = HfApi(token=token)
    with pushing(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A repo of somebody else that can be read is no error to the line above.
        api.auth_check(repo_id, write=True)
        there = api.list_repo_files(repo_id)
        is_public = private and api.model_info(repo_id).private is False
    if is_public:
        raise InputError(
            f"{repo_id!r} is there and public, but private was asked for. Make it private on the Hub, or name another."
        )
    ours = [name for name, place in find_heads(there, repo_id).items() if place.layout is None]
    other = sorted(set(there) - _EMPTY_REPO)
    if other and (not ours or ("" in ours and _is_an_lm(repo_id, token))):
        raise InputError(
            f"{repo_id!r} is taken: it holds {', '.join(other[:3])} and no head of ours. Name another repo."
        )
    return repo_id


@contextmanager
def pushing(repo_id: str) -> Iterator[None]:
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


def _heads(folder: Path, include: Sequence[str]) -> SaeHeads:
    heads = AutoSae.open(folder)
    heads = heads.select(*include) if include else heads
    if foreign := [name for name in heads if not heads.is_ours(name)]:
        raise InputError(
            f"Head {foreign[0]!r} of {str(folder)!r} is in another library's layout. Load the folder by "
            "AutoSae.open and push that."
        )
    return heads


def _files(folder: Path, heads: SaeHeads) -> dict[str, Path]:
    """By their paths in the repo."""
    names = [file for name in heads for file in heads.files(name)]
    names += [name for name in RUN_FILES if (folder / name).is_file()]
    names += [str(path.relative_to(folder)) for path in sorted((folder / ADAPTER).glob("adapter_*")) if path.is_file()]
    return {name: folder / name for name in names}


def _card(release: Release, repo_id: str, place: Path) -> dict[str, Path]:
    """The card with the repo's name in it, and its plots, beside the run's folder."""
    card = write_card(release.folder, repo_id, release.license, release.include, into=place)
    plots = {str(path.relative_to(place)): path for path in sorted(place.glob("plots/*.png"))}
    return plots | {CARD: card}


def _is_an_lm(repo_id: str, token: str | bool | None) -> bool:
    """Whether what looks like a head at the top, by the names of files, is another model."""
    try:
        AutoSae.open(repo_id, token=token).config("")
    except InputError:
        return True
    return False


def _advice(error: BaseException) -> str:
    cause = _cause(error)
    response = cause.response if isinstance(cause, HfHubHTTPError) else None
    if response is not None and response.status_code == 401:
        return _LOG_IN
    is_busy = response is None or response.status_code == 429 or response.status_code >= 500
    # A ValueError is the client's own: of a name that no repo can have, for one.
    return AGAIN if is_busy and not isinstance(cause, ValueError) else ""


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    said = str(error) if cause is error else f"{error} {cause}"
    text = " ".join(said.split())
    return re.sub(r"For more information check: \S+ ?", "", text) or type(error).__name__


def _cause(error: BaseException) -> BaseException:
    # The client's own line for a file that failed says nothing of why.
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error

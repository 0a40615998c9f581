import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, RepoFile, RepoUrl
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from ..cards.model_card import CARD, is_ours, is_somebodys, write_card
from ..cards.run import check_run
from ..common.errors import InputError
from ..common.hub_answers import commit_of
from ..common.hub_requests import HubFailed, ask_again
from ..common.quiet import quiet_files
from ..common.tables import aligned
from ..loading.find import find_heads
from .files import is_config_of_ours, outdated_files, released_files, whole_heads
from .refusals import push_errors


CommitOperation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
# What every repo has that was just made, or that says nothing of what is in it.
_EMPTY_REPO = {".gitattributes", CARD, "LICENSE"}


class Pushed(NamedTuple):
    """
    A release on the Hub.

    Args:
        url (`str`): Of the repo.
        commit (`str`): The commit that holds it.
        is_new (`bool`): Whether there was anything to send.
        left (`tuple[str, ...]`): Heads of the repo that are no part of the release, and that its card does not name.
        left_card (`bool`): Whether the repo's card is somebody's own, and was left as it is.
    """

    url: str
    commit: str
    is_new: bool
    left: tuple[str, ...] = ()
    left_card: bool = False

    def about_left(self) -> str:
        """A line each, or nothing, about heads that an earlier release put there, and a card that somebody wrote."""
        lines = []
        if self.left:
            names = ", ".join(name or "the one at the top" for name in self.left)
            lines.append(f"\nHeads that were there, and that the new card does not name, were left: {names}.")
        if self.left_card:
            lines.append(
                f"\nThe repo's {CARD} was left, since somebody wrote it: it lacks the last line of a card of ours. "
                "Delete it there and push again to have a new one."
            )
        return "".join(lines)


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
        `InputError`: if there is no head in the folder, one or what the run told of itself is damaged, or a glob
            matches none.
    """

    def __init__(self, folder: str | Path, repo_id: str, include: Sequence[str] = (), license: str | None = None):
        if folder == "":
            raise InputError("The folder's name is empty. Name the run's folder, or '.' for the one that you are in.")
        self.folder, self.repo_id = Path(folder).expanduser(), repo_id
        self.include, self.license = list(include), license
        if not self.folder.is_dir():
            raise InputError(f"There is no folder {str(folder)!r}.")
        with push_errors(repo_id):
            validate_repo_id(repo_id)
        self.heads = whole_heads(self.folder, self.include)
        check_run(self.folder, self.include)
        self.files = released_files(self.folder, self.heads)

    def table(self, revision: str | None = None) -> str:
        """One line a file, with its size, and the sum; `revision` as of `push`."""
        with tempfile.TemporaryDirectory() as place:
            files = self.files | _card(self, self.repo_id, Path(place), revision)
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
        was_opened: bool = False,
    ) -> Pushed:
        """
        Sends all of it in one commit, and of that only what the repo does not have. Until the commit the repo stays as
        it was, so that a push that was interrupted can be run again. The commit also deletes what would tell of the
        weights that it replaces. A card that somebody wrote on the Hub stays, unless the folder has one too.

        Args:
            private (`bool`, *optional*): Whether a repo that is made for it is private; the namespace's default if not
                given.
            revision (`str`, *optional*): Branch to commit to, made if there is none; the main one if not given.
            token (`str`, *optional*): Hub token; the stored login if not given.
            message (`str`, *optional*): Of the commit.
            extra (`dict[str, Path]`, *optional*): Further files, by their path in the repo.
            was_opened (`bool`, defaults to `False`): Whether `open_repo` has found the repo fit for this run before.

        Raises:
            `InputError`: if the Hub refuses, with its reason, cannot be reached, or the repo holds something else.
        """
        api = HfApi(token=token)
        repo_id = open_repo(self.repo_id, private=private, token=token, was_opened=was_opened)
        with tempfile.TemporaryDirectory() as place, push_errors(repo_id):
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            before = commit_of(api.model_info(repo_id, revision=revision))
            there = api.list_repo_files(repo_id, revision=before)
            left = tuple(name for name in find_heads(there, repo_id) if name not in self.heads)
            files = self.files | _card(self, repo_id, Path(place), revision, among_others=bool(left)) | (extra or {})
            left_card = CARD in there and is_ours(files[CARD]) and is_somebodys(_fetch(api, repo_id, CARD, before))
            if left_card:
                del files[CARD]
            old = outdated_files(there, self.heads, files, replaces_all=not left)
            operations: list[CommitOperation] = [
                *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name, is_folder=False) for name in old),
            ]
            url = str(RepoUrl(f"{api.endpoint}/{repo_id}"))
            commit = _commit(api, repo_id, operations, message, revision, before)
        return Pushed(url, commit, commit != before, left, left_card)


def open_repo(
    repo_id: str, private: bool | None = None, token: str | bool | None = None, was_opened: bool = False
) -> str:
    """
    Makes a repo for heads if there is none, and gives its name with its namespace.

    Raises:
        `InputError`: if the Hub refuses, with its reason, cannot be reached, or the name is taken by something else.
    """
    api = HfApi(token=token)
    with push_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A repo of somebody else that can be read is no error to the line above.
        api.auth_check(repo_id, write=True)
        there = api.list_repo_files(repo_id)
        is_public = private and api.model_info(repo_id).private is False
        other = sorted(set(there) - _EMPTY_REPO)
        newest = api.list_repo_commits(repo_id)[0] if other and not _has_head(api, repo_id, there) else None
    if is_public:
        raise InputError(
            f"{repo_id!r} is there and public, but private was asked for. Make it private on the Hub, or name another."
        )
    if newest is not None:
        taken = "was free when this run began, but somebody else has committed to it" if was_opened else "is taken"
        raise InputError(
            f"{repo_id!r} {taken}: it holds {', '.join(other[:3])} and no head of ours, by the commit "
            f"{newest.title!r} of {newest.created_at:%Y-%m-%d %H:%M}. Name another repo."
        )
    return repo_id


def _card(
    release: Release, repo_id: str, place: Path, revision: str | None, among_others: bool = False
) -> dict[str, Path]:
    """The card with the repo's name in it, and its plots, beside the run's folder."""
    card = write_card(
        release.folder, repo_id, release.license, release.include, place, revision=revision, among_others=among_others
    )
    plots = {str(path.relative_to(place)): path for path in sorted(place.glob("plots/*.png"))}
    return plots | {CARD: card}


def _commit(
    api: HfApi, repo_id: str, operations: Sequence[CommitOperation], message: str, revision: str | None, before: str
) -> str:
    """
    The id of a commit on top of `before`, for which what it changes was decided. A commit that is there although its
    answer was lost counts.
    """
    try:
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=before
        ).oid
    except (HTTPError, HubFailed):
        ask_again()
        newest, *older = api.list_repo_commits(repo_id, revision=revision)
        if older and older[0].commit_id == before and _holds(api, repo_id, newest.commit_id, operations):
            return newest.commit_id
        raise


def _holds(api: HfApi, repo_id: str, commit: str, operations: Sequence[CommitOperation]) -> bool:
    """Whether a commit has the large files that were to be added, which are the weights."""
    added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    there = api.get_paths_info(repo_id, [operation.path_in_repo for operation in added], revision=commit)
    large = {item.path: item.lfs.sha256 for item in there if isinstance(item, RepoFile) and item.lfs}
    ours = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in added}
    return bool(large) and large.items() <= ours.items() and len(there) == len(added)


def _has_head(api: HfApi, repo_id: str, there: list[str]) -> bool:
    """Whether what looks like a head of ours, by the names of files, is one; other models have such files too."""
    ours = [place for place in find_heads(there, repo_id).values() if place.layout is None]
    # What lies at the top is what the repo is of.
    ours = [place for place in ours if not place.name] or ours
    return any(is_config_of_ours(_fetch(api, repo_id, place.files["config"])) for place in ours)


def _fetch(api: HfApi, repo_id: str, file: str, revision: str | None = None) -> Path:
    with quiet_files():
        return Path(api.hf_hub_download(repo_id, file, revision=revision))

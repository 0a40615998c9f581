"""
Releases heads on the Hub: one commit with weights, configs, model card, recipe and metrics.

`Release` checks the folder before the Hub is asked anything. `push` then compares with the repo as it is, and makes
one commit that adds the new files and deletes those that describe older weights. So a reader of the repo never sees
half a release, and an interrupted push can be repeated. A card that a person has written is never replaced.
"""

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
# Files that a new repo may have, and that say nothing about its content.
_EMPTY_REPO = {".gitattributes", CARD, "LICENSE"}


class Pushed(NamedTuple):
    """
    The result of a push.

    Args:
        url (`str`): Address of the repo.
        commit (`str`): Id of the commit that holds the release.
        is_new (`bool`): Whether there was anything to send.
        left (`tuple[str, ...]`): Older heads in the repo. They stay, but the new card does not name them.
        left_card (`bool`): Whether the repo's card stays, since a person wrote it.
    """

    url: str
    commit: str
    is_new: bool
    left: tuple[str, ...] = ()
    left_card: bool = False

    def about_left(self) -> str:
        """One line about older heads that stay, and one about a card that stays; empty if there are none."""
        lines = []
        if self.left:
            names = ", ".join(name or "the one at the top" for name in self.left)
            lines.append(f"\nOlder heads stay in the repo, but its new card does not name them: {names}.")
        if self.left_card:
            lines.append(
                f"\nThe repo's {CARD} stays, since a person wrote it: it lacks the last line of a generated card. "
                "To have a generated card, delete it on the Hub and push again."
            )
        return "".join(lines)


class Release:
    """
    The files of a folder that go to the Hub: configs and weights of the heads, model card, recipe, metrics, and the
    LoRA of the run if it has one. Checkpoints, logs and optimizer states are not sent.

    Args:
        folder (`str` or `Path`): A run's folder, or another folder with heads in this package's layout.
        repo_id (`str`): The repo to push to: `name` or `user/name`.
        include (`Sequence[str]`): Globs over the names of heads; all heads if not given.
        license (`str`, *optional*): The Hub's identifier of a license, for the card.

    Raises:
        `InputError`: if the folder has no head, a head or a report of the run is damaged, or a glob matches none.

    Examples:
        ```python { no-run }
        from sae_accel.hub import Release

        release = Release("runs/quickstart", "user/my-saes", include=["layers.*"], license="mit")
        print(release.table())  # the files and their sizes; nothing is sent yet
        pushed = release.push(private=True)
        print(pushed.url, pushed.commit)
        ```
    """

    def __init__(self, folder: str | Path, repo_id: str, include: Sequence[str] = (), license: str | None = None):
        if folder == "":
            raise InputError("The folder's name is empty. Give the run's folder, or '.' for the current folder.")
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
        """
        Lists the files that `push` sends, one per line with its size in bytes, and the sum. Nothing is sent.

        Args:
            revision (`str`, *optional*): Branch that the card names, as in [`push`].

        Examples:
            ```python
            from sae_accel.hub import Release

            print(Release("runs/quickstart", "user/my-saes").table())
            ```
        """
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
        Sends the release in one commit. Files that the repo has already are not sent again, so an interrupted push can
        be repeated: until the commit, the repo stays as it was. The same commit deletes files that describe the
        replaced weights. A card that a person wrote on the Hub stays, unless the folder has such a card too.

        Args:
            private (`bool`, *optional*): Whether a new repo is private; the namespace's default if not given.
            revision (`str`, *optional*): Branch to commit to, made if it does not exist; the main one if not given.
            token (`str`, *optional*): Hub token; the stored login if not given.
            message (`str`, *optional*): Message of the commit.
            extra (`dict[str, Path]`, *optional*): Further files to send, by their path in the repo.
            was_opened (`bool`, defaults to `False`): Whether `open_repo` has already accepted the repo for this run.

        Returns:
            [`Pushed`]: the repo's address and the commit.

        Raises:
            `InputError`: if the Hub refuses, with its reason, cannot be reached, or the repo holds something else.

        Examples:
            ```python { no-run }
            from sae_accel.hub import Release

            pushed = Release("runs/quickstart", "user/my-saes").push(revision="v2", message="More tokens")
            pushed.is_new  # False if the repo had all files already
            ```
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
    Makes a repo for heads if it does not exist, and returns its full name, `user/name`.

    Args:
        repo_id (`str`): `name` or `user/name`.
        private (`bool`, *optional*): Whether a new repo is private; the namespace's default if not given.
        token (`str`, *optional*): Hub token; the stored login if not given.
        was_opened (`bool`, defaults to `False`): Whether an earlier call has accepted the repo, for the error's words.

    Raises:
        `InputError`: if the Hub refuses, with its reason, cannot be reached, or the repo holds something else.

    Examples:
        ```python { no-run }
        from sae_accel.hub import open_repo

        open_repo("my-saes", private=True)  # "user/my-saes"
        ```
    """
    api = HfApi(token=token)
    with push_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # `create_repo` accepts a readable repo of somebody else, so the right to write is checked.
        api.auth_check(repo_id, write=True)
        there = api.list_repo_files(repo_id)
        is_public = private and api.model_info(repo_id).private is False
        other = sorted(set(there) - _EMPTY_REPO)
        newest = api.list_repo_commits(repo_id)[0] if other and not _has_head(api, repo_id, there) else None
    if is_public:
        raise InputError(
            f"{repo_id!r} exists and is public, but private was asked for. Make it private on the Hub, or use another "
            "name."
        )
    if newest is not None:
        taken = "was free when this run began, but somebody else has committed to it" if was_opened else "is taken"
        raise InputError(
            f"{repo_id!r} {taken}: it holds {', '.join(other[:3])} and no head of sae_accel, by the commit "
            f"{newest.title!r} of {newest.created_at:%Y-%m-%d %H:%M}. Use another name."
        )
    return repo_id


def _card(
    release: Release, repo_id: str, place: Path, revision: str | None, among_others: bool = False
) -> dict[str, Path]:
    """Writes the card for a repo, and its plots, into `place`, so that the run's folder stays as it is."""
    card = write_card(
        release.folder, repo_id, release.license, release.include, place, revision=revision, among_others=among_others
    )
    plots = {str(path.relative_to(place)): path for path in sorted(place.glob("plots/*.png"))}
    return plots | {CARD: card}


def _commit(
    api: HfApi, repo_id: str, operations: Sequence[CommitOperation], message: str, revision: str | None, before: str
) -> str:
    """
    Commits on top of `before`, the commit that the changes were planned for, and returns the new id. If the Hub's
    answer is lost, the function looks whether the commit was made.
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
    """Whether a commit has the large files of `operations`: the weights."""
    added = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    there = api.get_paths_info(repo_id, [operation.path_in_repo for operation in added], revision=commit)
    large = {item.path: item.lfs.sha256 for item in there if isinstance(item, RepoFile) and item.lfs}
    ours = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in added}
    return bool(large) and large.items() <= ours.items() and len(there) == len(added)


def _has_head(api: HfApi, repo_id: str, there: list[str]) -> bool:
    """Whether a repo has a head of this package. Other models use the same file names, so the config is read."""
    ours = [place for place in find_heads(there, repo_id).values() if place.layout is None]
    # A head at the top decides what the repo is, whatever its folders hold.
    ours = [place for place in ours if not place.name] or ours
    return any(is_config_of_ours(_fetch(api, repo_id, place.files["config"])) for place in ours)


def _fetch(api: HfApi, repo_id: str, file: str, revision: str | None = None) -> Path:
    with quiet_files():
        return Path(api.hf_hub_download(repo_id, file, revision=revision))

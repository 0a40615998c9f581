"""
Lists and fetches the files of a local folder or of a repo on the Hub.

The commit of a repo is asked for once, and every file is fetched at this commit, so that heads of one mapping belong
together even if the repo changes. Each download is compared with the size and the checksum that the Hub states. If the
Hub cannot be reached, the files from earlier calls in the cache are used, and `from_cache` says so.
"""

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from ..common.errors import InputError
from ..common.hub_answers import COMMIT, Unreachable, commit_of, hub_errors
from ..common.hub_requests import hub_requests, read_again
from ..common.manifest import Manifest
from ..common.run_files import NOT_HEADS


# Arguments of from_pretrained that say where and how files are found, not how a head is loaded.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class Repository:
    """
    The files of a local folder or of a repo on the Hub, listed at once and fetched one by one. Every file is fetched
    at the commit that was listed, and must have the size and the checksum that the Hub states.

    Args:
        name (`str`): A folder, a file in a folder, or a repo such as `EleutherAI/sae-llama-3-8b-32x`.
        options (`dict`): `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`, as in
            transformers.

    Attributes:
        files (`list[str]`): All files, as paths inside the folder or repo.
        commit (`str`, *optional*): The commit of a repo, if the Hub was asked.
        from_cache (`str`): Why only the files in the cache are known; empty if the Hub was asked.

    Raises:
        `InputError`: if there is no such folder or repo, or the Hub refuses or fails, with the reason.
    """

    def __init__(self, name: str, **options: Any):
        self.name = name
        self.options = {key: value for key, value in options.items() if value is not None}
        self.folder = Path(name).expanduser() if _is_local(name) else None
        self.commit: str | None = None
        self.from_cache = ""
        self._told: dict[str, RepoFile] = {}
        self.files = self._list()

    def fetch(self, file: str) -> str:
        """
        Returns the path of a file on this machine, and downloads the file first if necessary.

        Raises:
            `InputError`: if the file does not arrive, or arrives twice with another size or checksum than the Hub
                states.
        """
        if self.folder is not None:
            return str(self.folder / file)
        try:
            with hub_errors(self.name), hub_requests(f"fetching {file} of {self.name!r}"):
                return self._fetch(file)
        except Unreachable as error:
            raise InputError(f"{self.name!r} cannot be read: {file} did not arrive: {error}. Try again.") from error

    def _fetch(self, file: str) -> str:
        options = self.options | ({"revision": self.commit} if self.commit else {})
        at_hand = self._at_hand(file)
        if at_hand is not None:
            return at_hand
        path = read_again(lambda: hf_hub_download(self.name, file, **options))
        if wrong := self._differs(file, path):
            path = read_again(lambda: hf_hub_download(self.name, file, **options | {"force_download": True}))
            wrong = self._differs(file, path)
        if wrong:
            # The next call must not find the wrong file in the cache.
            os.remove(os.path.realpath(path))
            Path(path).unlink(missing_ok=True)
            raise InputError(f"{self.name!r} cannot be read: {file} arrived twice {wrong}. Try again later.")
        self._remember_commit()
        return path

    def _at_hand(self, file: str) -> str | None:
        """Returns the path of a file of this commit that an earlier call has fetched and checked."""
        if self.commit is None or self.options.get("force_download"):
            return None
        path = try_to_load_from_cache(self.name, file, self.options.get("cache_dir"), self.commit)
        told = self._told.get(file)
        if not isinstance(path, str) or (told is not None and os.path.getsize(path) != told.size):
            return None
        return path

    def _differs(self, file: str, path: str) -> str | None:
        """Returns how a file differs from the Hub's size and checksum; None if it does not."""
        told = self._told.get(file)
        if told is None:
            return None
        if (size := os.path.getsize(path)) != told.size:
            return f"with {size:,} bytes, where the Hub has {told.size:,}"
        expected, found = (told.lfs.sha256, hashlib.sha256()) if told.lfs else (told.blob_id, _as_of_git(size))
        with open(path, "rb") as content:
            while block := content.read(2**20):
                found.update(block)
        return None if found.hexdigest() == expected else "with another content than the Hub's checksum is of"

    def _remember_commit(self) -> None:
        """Writes the commit of a branch into the cache, as the client does if it fetches by a branch."""
        revision = self.options.get("revision", "main")
        if self.commit is None or COMMIT.fullmatch(revision):
            return
        folder = repo_folder_name(repo_id=self.name, repo_type="model")
        ref = Path(self.options.get("cache_dir") or constants.HF_HUB_CACHE) / folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(self.commit)

    def _list(self) -> list[str]:
        if self.folder is not None:
            if self.folder.is_file():
                file, self.folder = self.folder, self.folder.parent
                # The files that describe the head are beside it.
                return [file.name, *(path.name for path in self.folder.iterdir() if path.suffix in (".json", ".yaml"))]
            if not self.folder.is_dir():
                raise InputError(f"There is no folder {self.name!r}.")
            return _of_the_run(self.folder, _list_folder(self.folder))
        if self.options.get("local_files_only"):
            return self._list_cache("local_files_only forbids asking the Hub")
        try:
            with hub_errors(self.name), hub_requests(f"listing {self.name!r}"):
                return self._list_hub()
        except Unreachable as error:
            return self._list_cache(f"the Hub cannot be reached to look for it: {error}")

    def _list_hub(self) -> list[str]:
        api, revision = HfApi(token=self.options.get("token")), self.options.get("revision")
        self.commit = commit_of(api.model_info(self.name, revision=revision))
        tree = api.list_repo_tree(self.name, recursive=True, revision=self.commit)
        for item in tree:
            if isinstance(item, RepoFile):
                if not (isinstance(item.path, str) and isinstance(item.size, int) and isinstance(item.blob_id, str)):
                    raise LookupError("the listing does not have the form of the Hub's")
                self._told[item.path] = item
        return list(self._told)

    def _list_cache(self, reason: str) -> list[str]:
        """Lists the files that earlier calls fetched, without the Hub."""
        self.from_cache = reason
        options = {key: value for key, value in self.options.items() if key in ("revision", "cache_dir")}
        try:
            return _list_folder(Path(snapshot_download(self.name, local_files_only=True, **options)))
        except (LocalEntryNotFoundError, ValueError) as error:
            raise InputError(f"{self.name!r} is not a local folder, is not in the cache, and {reason}.") from error


def _as_of_git(size: int) -> "hashlib._Hash":
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _is_local(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _of_the_run(folder: Path, files: list[str]) -> list[str]:
    """Returns the files of a run's folder that are the run's own; the folder may also hold LMs and other runs."""
    manifest = Manifest.read(folder)
    if manifest is None:
        return files
    parts = ((file, PurePosixPath(file)) for file in files)
    return [
        file
        for file, path in parts
        if len(path.parts) == 1 or str(path.parent) in manifest.places or NOT_HEADS.fullmatch(path.parts[0])
    ]


def _list_folder(folder: Path) -> list[str]:
    return [
        str((Path(root) / file).relative_to(folder))
        for root, _, files in os.walk(folder, followlinks=True)
        for file in files
    ]

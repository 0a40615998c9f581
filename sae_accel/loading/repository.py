import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, RepoFile, hf_hub_download, snapshot_download

# The Hub client's own HTTP library has changed its name, so its base error is taken from where the client has it.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..common.errors import InputError, one_line
from ..common.manifest import Manifest
from ..common.run_files import NOT_HEADS


# Arguments of from_pretrained that say where and how files are found, rather than what becomes of them.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class Repository:
    """
    The files of a local folder or of a repo on the Hub, listed at once and fetched one by one.

    Args:
        name (`str`): A folder, a file in one, or a repo such as `EleutherAI/sae-llama-3-8b-32x`.
        options (`dict`): `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`, as in
            transformers.

    Raises:
        `InputError`: if there is no such folder or repo, with the Hub's own reason.
    """

    def __init__(self, name: str, **options: Any):
        self.name = name
        self.options = {key: value for key, value in options.items() if value is not None}
        self.folder = Path(name).expanduser() if _is_local(name) else None
        # Whether the Hub was asked, or what an earlier call fetched is all that is known.
        self.from_cache = False
        self.files = self._list()

    def fetch(self, file: str) -> str:
        """Path of a file on this machine, after downloading it if need be."""
        if self.folder is not None:
            return str(self.folder / file)
        try:
            with hub_errors(self.name):
                return hf_hub_download(self.name, file, **self.options)
        except _Unreachable as error:
            raise InputError(f"{self.name!r} cannot be read: {file} did not arrive: {error}. Try again.") from error

    def _list(self) -> list[str]:
        if self.folder is not None:
            if self.folder.is_file():
                file, self.folder = self.folder, self.folder.parent
                # What describes it lies beside it.
                return [file.name, *(path.name for path in self.folder.iterdir() if path.suffix in (".json", ".yaml"))]
            if not self.folder.is_dir():
                raise InputError(f"There is no folder {self.name!r}.")
            return _of_the_run(self.folder, _list_folder(self.folder))
        if not self.options.get("local_files_only"):
            try:
                with hub_errors(self.name):
                    api, revision = HfApi(token=self.options.get("token")), self.options.get("revision")
                    # Asked first, because a tree is asked for again and again while there is no answer.
                    api.model_info(self.name, revision=revision)
                    tree = api.list_repo_tree(self.name, recursive=True, revision=revision)
                    return [item.path for item in tree if isinstance(item, RepoFile)]
            except _Unreachable as error:
                return self._list_cache(f"the Hub cannot be reached to look for it: {error}")
        return self._list_cache("the Hub was not to be asked")

    def _list_cache(self, reason: str) -> list[str]:
        """Without the Hub, what an earlier call fetched."""
        self.from_cache = True
        options = {key: value for key, value in self.options.items() if key in ("revision", "cache_dir")}
        try:
            return _list_folder(Path(snapshot_download(self.name, local_files_only=True, **options)))
        except (LocalEntryNotFoundError, ValueError) as error:
            raise InputError(f"{self.name!r} is no local folder, is not in the cache, and {reason}.") from error


class _Unreachable(Exception):
    """The Hub gave no answer."""


class hub_errors:
    """Turns the Hub's refusal into one line with its reason, and no answer into `_Unreachable`."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        refused = isinstance(error, HfHubHTTPError) and not _is_down(error)
        if isinstance(error, (OfflineModeIsEnabled, HTTPError)) and not refused:
            raise _Unreachable(_in_a_line(error)) from error
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, InputError):
            # Of a file that was not found the client gives the reason apart.
            cause = f" {_in_a_line(error.__cause__)}" if isinstance(error, LocalEntryNotFoundError) else ""
            raise InputError(f"{self.name!r} cannot be read: {_in_a_line(error)}{cause}") from error


def _is_down(error: HfHubHTTPError) -> bool:
    return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)


def _in_a_line(error: BaseException | None) -> str:
    return one_line(error or "").rstrip(".")


def _is_local(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _of_the_run(folder: Path, files: list[str]) -> list[str]:
    """Of a run's folder, which may hold LMs and other runs too, what is the run's own."""
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

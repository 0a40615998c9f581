import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile, hf_hub_download, snapshot_download

# The Hub client's own HTTP library has changed its name, so its base error is taken from where the client has it.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..errors import InputError


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
        self.files = self._list()

    def fetch(self, file: str) -> str:
        """Path of a file on this machine, after downloading it if need be."""
        if self.folder is not None:
            return str(self.folder / file)
        with explaining(self.name):
            return hf_hub_download(self.name, file, **self.options)

    def _list(self) -> list[str]:
        if self.folder is not None:
            if self.folder.is_file():
                file, self.folder = self.folder, self.folder.parent
                # What describes it lies beside it.
                return [file.name, *(path.name for path in self.folder.iterdir() if path.suffix in (".json", ".yaml"))]
            if not self.folder.is_dir():
                raise InputError(f"There is no folder {self.name!r}.")
            return _list_folder(self.folder)
        if not self.options.get("local_files_only"):
            try:
                with explaining(self.name):
                    api, revision = HfApi(token=self.options.get("token")), self.options.get("revision")
                    # Asked first, because a tree is asked for again and again while there is no answer.
                    api.model_info(self.name, revision=revision)
                    tree = api.list_repo_tree(self.name, recursive=True, revision=revision)
                    return [item.path for item in tree if isinstance(item, RepoFile)]
            except _Unreachable:
                pass
        return self._list_cache()

    def _list_cache(self) -> list[str]:
        """Without the Hub, what an earlier call fetched."""
        options = {key: value for key, value in self.options.items() if key in ("revision", "cache_dir")}
        try:
            return _list_folder(Path(snapshot_download(self.name, local_files_only=True, **options)))
        except (LocalEntryNotFoundError, ValueError) as error:
            raise InputError(
                f"{self.name!r} is no local folder, is not in the cache, and the Hub cannot be reached to look for it."
            ) from error


class _Unreachable(Exception):
    """The Hub gave no answer."""


class explaining:
    """Turns the Hub's refusal into one line with its reason, and no answer into `_Unreachable`."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        refused = isinstance(error, HfHubHTTPError)
        if isinstance(error, (OfflineModeIsEnabled, HTTPError)) and not refused:
            raise _Unreachable from error
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, InputError):
            raise InputError(f"{self.name!r} cannot be read: {' '.join(str(error).split())}") from error


def _is_local(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _list_folder(folder: Path) -> list[str]:
    return [
        str((Path(root) / file).relative_to(folder))
        for root, _, files in os.walk(folder, followlinks=True)
        for file in files
    ]

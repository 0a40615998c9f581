"""
Decides which files of a folder a release sends, and which files of the repo it deletes.

A release must never show one set of weights and describe another. So the folder's heads are checked before anything is
sent: every config has its weights, and all weights are finite. Files in the repo that describe older weights go.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ..cards.plots import FREQUENCY_PLOT, FVU_PLOT
from ..common.errors import InputError
from ..common.globs import glob_to_regex
from ..common.run_files import ADAPTER, RUN_FILES, folders_of
from ..formats import Place
from ..loading.auto import AutoSae
from ..loading.find import find_heads
from ..loading.head_files import check_weights, head_errors, refuse_non_finite, stored_config
from ..loading.repository import Repository
from ..loading.sae_heads import SaeHeads
from ..models.registry import known_config


_WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")
# Files that describe a run's heads, beside the card and a LoRA.
_REPORT = (*RUN_FILES, FVU_PLOT, FREQUENCY_PLOT)


def whole_heads(folder: Path, include: Sequence[str]) -> SaeHeads:
    """
    Opens the heads of a folder and checks that they can be released: they are in this package's layout, and their
    weights fit their configs and are finite.

    Args:
        folder (`Path`): A run's folder, or another folder with heads.
        include (`Sequence[str]`): Globs over the names of heads; all heads if empty.

    Raises:
        `InputError`: if a head is damaged, not finite or in another library's layout, the folder has no head, or a
            glob matches none.
    """
    repository = Repository(str(folder))
    places = find_heads(repository.files, repository.name)
    _refuse_without_weights(repository, places, include)
    heads = AutoSae.open(folder)
    heads = heads.select(*include) if include else heads
    for name in heads:
        if not heads.is_ours(name):
            raise InputError(
                f"Head {name!r} of {str(folder)!r} is in another library's layout. Convert it, or load it with "
                "AutoSae.open and call push_to_hub on it."
            )
        place = places[name]
        place.paths = {role: folder / file for role, file in place.files.items()}
        with head_errors(repository, name):
            check_weights(place, stored_config(place, {}))
            refuse_non_finite(place, f"Head {name!r} of {str(folder)!r}" if name else f"The head of {str(folder)!r}")
    return heads


def released_files(folder: Path, heads: SaeHeads) -> dict[str, Path]:
    """The files of a folder that a release sends, by their paths in the repo. The card and its plots come later."""
    names = [file for name in heads for file in heads.files(name)]
    names += [name for name in RUN_FILES if (folder / name).is_file()]
    names += [str(path.relative_to(folder)) for path in sorted((folder / ADAPTER).glob("adapter_*")) if path.is_file()]
    return {name: folder / name for name in names}


def outdated_files(there: Iterable[str], heads: SaeHeads, files: Mapping[str, Path], replaces_all: bool) -> list[str]:
    """
    Lists the files of a repo that belong to older weights, and that a release must delete.

    Args:
        there (`Iterable[str]`): All files of the repo.
        heads ([`SaeHeads`]): The heads of the release.
        files (`Mapping[str, Path]`): The files of the release, by their paths in the repo.
        replaces_all (`bool`): Whether the repo has no other head than the release.
    """
    folders = {PurePosixPath(file).parent for name in heads for file in heads.files(name)}
    paths = [PurePosixPath(file) for file in there if file not in files]
    # If a single weights file stays beside new shards, a loader would read the old file.
    replaced = [path for path in paths if path.parent in folders and _WEIGHTS.fullmatch(path.name)]
    told = [path for path in paths if str(path) in _REPORT or str(path).startswith(f"{ADAPTER}/adapter_")]
    return [str(path) for path in [*replaced, *(told if replaces_all else [])]]


def is_config_of_ours(path: str | Path) -> bool:
    """Whether a `config.json` describes an SAE or transcoder of this package."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and known_config(content.get("model_type")) is not None


def _refuse_without_weights(repository: Repository, places: Mapping[str, Place], include: Sequence[str]) -> None:
    """Refuses a config without weights. A folder without weights is no head, and would be left out silently."""
    patterns = [re.compile(glob_to_regex(pattern)) for pattern in include]
    whole = {place.files.get("config") for place in places.values()}
    for name, files in folders_of(repository.files):
        config = files.get("config.json")
        is_asked_for = not patterns or any(p.fullmatch(name) or p.fullmatch(name.split("/")[0]) for p in patterns)
        if config and config not in whole and is_asked_for and is_config_of_ours(repository.fetch(config)):
            where = f"Head {name!r} of {repository.name!r}" if name else f"The head at the top of {repository.name!r}"
            raise InputError(
                f"{where} has a config.json but no weights: neither model.safetensors nor "
                "model.safetensors.index.json. Add the weights, or delete config.json."
            )

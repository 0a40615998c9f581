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
# What tells of a run's heads, beside the card and a LoRA that was trained around them.
_REPORT = (*RUN_FILES, FVU_PLOT, FREQUENCY_PLOT)


def whole_heads(folder: Path, include: Sequence[str]) -> SaeHeads:
    """
    The heads of a folder, all in our layout, with weights that their configs describe and that are finite.

    Raises:
        `InputError`: if one is damaged, not finite or another library's, there is none, or a glob matches none.
    """
    repository = Repository(str(folder))
    places = find_heads(repository.files, repository.name)
    _refuse_without_weights(repository, places, include)
    heads = AutoSae.open(folder)
    heads = heads.select(*include) if include else heads
    for name in heads:
        if not heads.is_ours(name):
            raise InputError(
                f"Head {name!r} of {str(folder)!r} is in another library's layout. Load the folder by AutoSae.open "
                "and push that."
            )
        place = places[name]
        place.paths = {role: folder / file for role, file in place.files.items()}
        with head_errors(repository, name):
            check_weights(place, stored_config(place, {}))
            refuse_non_finite(place, f"Head {name!r} of {str(folder)!r}" if name else f"The head of {str(folder)!r}")
    return heads


def released_files(folder: Path, heads: SaeHeads) -> dict[str, Path]:
    """What a release has of a folder, by the paths in the repo; the card is apart."""
    names = [file for name in heads for file in heads.files(name)]
    names += [name for name in RUN_FILES if (folder / name).is_file()]
    names += [str(path.relative_to(folder)) for path in sorted((folder / ADAPTER).glob("adapter_*")) if path.is_file()]
    return {name: folder / name for name in names}


def outdated_files(there: Iterable[str], heads: SaeHeads, files: Mapping[str, Path], replaces_all: bool) -> list[str]:
    """
    Files of a repo that would tell of other weights than those that a release puts there.

    Args:
        there (`Iterable[str]`): All files of the repo.
        heads ([`SaeHeads`]): Those of the release.
        files (`Mapping[str, Path]`): Those of the release, by their paths in the repo.
        replaces_all (`bool`): Whether the release leaves no other head there.
    """
    folders = {PurePosixPath(file).parent for name in heads for file in heads.files(name)}
    paths = [PurePosixPath(file) for file in there if file not in files]
    # Weights in one file would be loaded in the place of the shards beside them.
    replaced = [path for path in paths if path.parent in folders and _WEIGHTS.fullmatch(path.name)]
    told = [path for path in paths if str(path) in _REPORT or str(path).startswith(f"{ADAPTER}/adapter_")]
    return [str(path) for path in [*replaced, *(told if replaces_all else [])]]


def is_config_of_ours(path: str | Path) -> bool:
    """Whether a `config.json` is that of an SAE or transcoder."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and known_config(content.get("model_type")) is not None


def _refuse_without_weights(repository: Repository, places: Mapping[str, Place], include: Sequence[str]) -> None:
    """Without weights a folder is none of the heads, and would be left out without a word."""
    patterns = [re.compile(glob_to_regex(pattern)) for pattern in include]
    whole = {place.files.get("config") for place in places.values()}
    for name, files in folders_of(repository.files):
        config = files.get("config.json")
        is_asked_for = not patterns or any(p.fullmatch(name) or p.fullmatch(name.split("/")[0]) for p in patterns)
        if config and config not in whole and is_asked_for and is_config_of_ours(repository.fetch(config)):
            where = f"Head {name!r} of {repository.name!r}" if name else f"The head at the top of {repository.name!r}"
            raise InputError(
                f"{where} has a config.json but no weights: neither model.safetensors nor "
                "model.safetensors.index.json. Put them there, or take config.json away."
            )

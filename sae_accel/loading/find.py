"""Finds the heads in a list of files, from the files' names alone."""

import re
from collections.abc import Iterator

from ..common.errors import InputError
from ..common.run_files import folders_of
from ..formats import LAYOUTS, Place, torch_files
from .sae_heads import natural_key


_INDEX = "model.safetensors.index.json"


def find_heads(files: list[str], origin: str) -> dict[str, Place]:
    """
    Returns the heads among some files, by name.

    Args:
        files (`list[str]`): All files of a folder or repo, as paths inside it.
        origin (`str`): The folder or repo.

    Raises:
        `InputError`: if one folder holds two heads.
    """
    found = list(_our_places(files, origin))
    for layout in LAYOUTS:
        if layout is torch_files and found:
            # Beside heads of a known layout, a file that torch saved is not a head.
            break
        taken = {file for place in found for role, file in place.files.items() if role == "weights"}
        for place in layout.find([file for file in files if file not in taken], origin):
            place.layout = layout
            found.append(place)
    names = [place.name for place in found]
    if twice := next((place.name for place in found if names.count(place.name) > 1), None):
        both = [file for place in found if place.name == twice for file in place.files.values()]
        raise InputError(f"{origin!r} has two heads in one folder: {', '.join(both)}. Keep one of them there.")
    labels = [place.label for place in found]
    return {place.label if labels.count(place.label) == 1 else place.name: place for place in found}


def newest_checkpoint(files: list[str], origin: str) -> str | None:
    """Returns the last checkpoint folder of a run that holds heads; None if there is none."""
    inside: dict[str, list[str]] = {}
    for folder, _, file in (path.partition("/") for path in files):
        if re.fullmatch(r"checkpoint-\d+", folder):
            inside.setdefault(folder, []).append(file)
    newest_first = sorted(inside, key=natural_key, reverse=True)
    return next((folder for folder in newest_first if find_heads(inside[folder], origin)), None)


def _our_places(files: list[str], origin: str) -> Iterator[Place]:
    for folder, inside in folders_of(files):
        weights = [name for name in inside if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]
        if "config.json" in inside and {"model.safetensors", _INDEX} & set(weights):
            yield Place(folder, {"config": inside["config.json"]} | {name: inside[name] for name in weights}, origin)

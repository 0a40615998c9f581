"""A `Place` names the files of one head in a folder or repo, before anything is read."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import InputError


# The part of a foreign name that tells the place in the LM; the hookpoint replaces it.
_SAYS_WHERE = re.compile(r"^blocks\.|layer|^L?\d+|embedding")


@dataclass
class Place:
    """
    One head among the files of a folder or repo.

    Args:
        name (`str`): The head's name in its own library: a folder, or a file without its ending; empty at the top.
        files (`dict[str, str]`): The head's files in the repo, by role.
        origin (`str`): The folder or repo.
        hookpoint (`str`, *optional*): The head's hookpoint, if the names of its files tell it.
        paths (`dict[str, Path]`): The files that are on this machine, by role.
        given (`dict[str, Any]`): Fields of the config that the user gave, because no file tells them.
        layout (`ModuleType`, *optional*): The layout of the files; our own if not given.
    """

    name: str
    files: dict[str, str]
    origin: str
    hookpoint: str | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    layout: ModuleType | None = None

    @property
    def label(self) -> str:
        """
        The head's name here: `<hookpoint>`, `<hookpoint>/<rest of its own name>`, or its own name if the hookpoint is
        not known.
        """
        if self.hookpoint is None or self.name.split("/")[0] == self.hookpoint:
            return self.name
        parts = self.name.split("/")
        where = next((i for i, part in enumerate(parts) if _SAYS_WHERE.search(part)), None)
        return "/".join([self.hookpoint, *(part for i, part in enumerate(parts) if part and i != where)])

    def json(self, role: str) -> dict[str, Any]:
        """
        Returns the content of a JSON file.

        Raises:
            `InputError`: if the file is not JSON, or does not hold an object.
        """
        path = self.paths[role]
        try:
            content = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise InputError(f"{str(path)!r} does not hold a JSON object.")
        return content

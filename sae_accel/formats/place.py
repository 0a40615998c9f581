import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..common.errors import InputError


# The part of a foreign name that its hookpoint takes the place of.
_SAYS_WHERE = re.compile(r"^blocks\.|layer|^L?\d+|embedding")


@dataclass
class Place:
    """
    Where a head lies.

    Args:
        name (`str`): What its own library calls it: a folder, or a file without its ending; empty at the top.
        files (`dict[str, str]`): Its files in the repo, by role.
        origin (`str`): The folder or repo.
        hookpoint (`str`, *optional*): Where it sits, in our words, as far as names of files tell.
        paths (`dict[str, Path]`): Those of the files that are on this machine.
        given (`dict[str, Any]`): Fields of the config that the user gave, for what files do not tell.
        layout (`ModuleType`, *optional*): Whose layout it is; ours if not given.
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
        """Its name here: `<hookpoint>` or `<hookpoint>/<what else its name says>`; its own if that is not known."""
        if self.hookpoint is None or self.name.split("/")[0] == self.hookpoint:
            return self.name
        parts = self.name.split("/")
        where = next((part for part in parts if _SAYS_WHERE.search(part)), None)
        return "/".join([self.hookpoint, *(part for part in parts if part and part is not where)])

    def json(self, role: str) -> dict[str, Any]:
        """
        A JSON file's content.

        Raises:
            `InputError`: if it is none.
        """
        path = self.paths[role]
        try:
            content = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise InputError(f"{str(path)!r} holds no settings by name.")
        return content

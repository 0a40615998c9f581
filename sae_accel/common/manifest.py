"""
The list of the files and folders that a run owns in its output folder.

A run may only delete or replace its own files, even after a kill. So it writes this list, `manifest.json`, before it
writes anything else. The next run reads the list, and leaves every other file as it is.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from .files import read_json, write_json
from .run_files import MANIFEST


# Names of checkpoints that a kill interrupted while they were written or pushed.
_UNFINISHED = re.compile(r"\.checkpoint-\d+\.(partial|pushing)")


@dataclass
class Manifest:
    """
    The files and folders that a run owns, as paths below its output folder.

    Args:
        places (`list[str]`): Folders of heads, or of a LoRA.
        files (`list[str]`): Reports, such as metrics, recipe, card and plots.
        logs (`list[str]`): Folders of trackers.
        checkpoints (`list[str]`): Checkpoints, in the order in which they were written.
        identity (`dict[str, Any]`): The settings that identify the run. Each of its checkpoints has them too.
    """

    places: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Reads the manifest of a run's folder. Returns None if no run has written there."""
        content = read_json(folder / MANIFEST).get("run")
        if not isinstance(content, dict):
            return None
        lists = {f.name: _paths_below(content.get(f.name)) for f in fields(cls) if f.name != "identity"}
        identity = content.get("identity")
        return cls(**lists, identity=identity if isinstance(identity, dict) else {})

    def write(self, folder: Path) -> None:
        """Writes the manifest into a run's folder, whole or not at all."""
        write_json(folder / MANIFEST, {"run": asdict(self)})

    def unfinished(self, folder: Path) -> list[Path]:
        """Paths in a run's folder that a kill interrupted while they were written."""
        found = {path for path in folder.glob(".checkpoint-*") if _UNFINISHED.fullmatch(path.name)}
        endings: dict[str, tuple[str, ...]] = dict.fromkeys(self.places, ("partial", "old", "saving-*"))
        endings |= dict.fromkeys(self.checkpoints, ("old",))
        endings |= dict.fromkeys([*self.files, MANIFEST], ("partial",))
        for path, ending in ((PurePosixPath(name), ending) for name in endings for ending in endings[name]):
            found.update((folder / path.parent).glob(f".{escape(path.name)}.{ending}"))
        return sorted(found)

    def claim(self, other: "Manifest") -> None:
        """Adds the paths of another manifest."""
        for name in ("places", "files", "logs", "checkpoints"):
            setattr(self, name, list(dict.fromkeys([*getattr(self, name), *getattr(other, name)])))


def _paths_below(value: Any) -> list[str]:
    """The paths in a list that stay below the folder, so that a damaged manifest never deletes other files."""
    paths: Iterable[Any] = value if isinstance(value, list) else ()
    return [path for path in paths if isinstance(path, str) and _is_below(path)]


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return name not in ("", ".") and not path.is_absolute() and ".." not in path.parts

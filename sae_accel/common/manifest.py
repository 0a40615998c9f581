"""What a run owns in its folder."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from .files import read_json, write_json
from .run_files import MANIFEST


# What a kill can leave of a checkpoint that was being written or pushed.
_UNFINISHED = re.compile(r"\.checkpoint-\d+\.(partial|pushing)")


@dataclass
class Manifest:
    """
    What a run owns in its folder, by paths below it. It is written down before anything else is, so that whatever a
    kill leaves is known as the run's own.

    Args:
        places (`list[str]`): Folders of heads, or of a LoRA.
        files (`list[str]`): Reports: metrics, recipe, card, plots and alike.
        logs (`list[str]`): Folders of trackers.
        checkpoints (`list[str]`): In the order in which they were written.
        identity (`dict[str, Any]`): What the run is, as a checkpoint of it says too.
    """

    places: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Of a run's folder; None if no run has been there."""
        content = read_json(folder / MANIFEST).get("run")
        if not isinstance(content, dict):
            return None
        lists = {f.name: _paths_below(content.get(f.name)) for f in fields(cls) if f.name != "identity"}
        identity = content.get("identity")
        return cls(**lists, identity=identity if isinstance(identity, dict) else {})

    def write(self, folder: Path) -> None:
        """Puts it into a run's folder, whole or not at all."""
        write_json(folder / MANIFEST, {"run": asdict(self)})

    def unfinished(self, folder: Path) -> list[Path]:
        """What a kill left, in a run's folder, of what was being written."""
        found = {path for path in folder.glob(".checkpoint-*") if _UNFINISHED.fullmatch(path.name)}
        endings: dict[str, tuple[str, ...]] = dict.fromkeys(self.places, ("partial", "old", "saving-*"))
        endings |= dict.fromkeys(self.checkpoints, ("old",))
        endings |= dict.fromkeys([*self.files, MANIFEST], ("partial",))
        for path, ending in ((PurePosixPath(name), ending) for name in endings for ending in endings[name]):
            found.update((folder / path.parent).glob(f".{escape(path.name)}.{ending}"))
        return sorted(found)

    def claim(self, other: "Manifest") -> None:
        """Adds what another owns."""
        for name in ("places", "files", "logs", "checkpoints"):
            setattr(self, name, list(dict.fromkeys([*getattr(self, name), *getattr(other, name)])))


def _paths_below(value: Any) -> list[str]:
    """Of a list that a file holds, paths that lead below its folder: what is damaged must not delete others' files."""
    paths: Iterable[Any] = value if isinstance(value, list) else ()
    return [path for path in paths if isinstance(path, str) and _is_below(path)]


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return name not in ("", ".") and not path.is_absolute() and ".." not in path.parts

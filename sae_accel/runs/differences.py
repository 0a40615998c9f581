"""The differences between the settings of a checkpoint and the settings of the run that goes on from it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..processes.agreement import say
from ..recipe.changes import rule_of


# A hash of the first training rows. If only the hash differs, the files have changed under an unchanged name.
ROWS = "data.rows"


@dataclass
class Differences:
    """
    The differences between two runs, sorted by the rules of `recipe.changes`.

    Args:
        refused (`dict[str, str]`): Fields that must not differ, each with both values in words.
        changed (`dict[str, str]`): Fields that may differ, each with both values in words.
        told (`dict[str, str]`): Fields that may differ, but make held-out metrics unreliable.
        moves (`bool`): Whether the two runs read different data, so that a place in one means nothing in the other.
    """

    refused: dict[str, str]
    changed: dict[str, str]
    told: dict[str, str]
    moves: bool

    @classmethod
    def between(cls, theirs: Mapping[str, Any], ours: Mapping[str, Any], allowed: Iterable[str] = ()) -> "Differences":
        """
        Compares the identities of two runs.

        Args:
            theirs (`Mapping[str, Any]`): The checkpoint's identity, by section; missing fields are not compared.
            ours (`Mapping[str, Any]`): This run's identity.
            allowed (`Iterable[str]`): Fields that may differ although the rules refuse it, from
                `training.allow_changes`.
        """
        found, allowed = cls({}, {}, {}, False), set(allowed)
        for field, words in _differing(theirs, ours):
            rule = rule_of(field)
            if rule == "fixed" or (rule in ("asks", "moves") and field not in allowed):
                kind = found.refused
            elif rule == "silent":
                continue
            else:
                kind = found.told if rule == "tells" else found.changed
            kind[field] = f"{kind[field]}; {words}" if field in kind else words
            # Another number of held-out sequences also changes which sequences train, and their order.
            found.moves = found.moves or rule in ("moves", "tells")
        if found.moves:
            # The rows differ because of another field, which is reported already.
            found.refused.pop(ROWS, None)
        return found

    def refuse(self, checkpoint: Path) -> None:
        """
        Refuses to go on from a checkpoint.

        Raises:
            `InputError`: if a field differs that must not.
        """
        if not self.refused:
            return
        what, meant = "other data" if [*self.refused] == [ROWS] else "another recipe", ""
        if all(rule_of(field) != "fixed" for field in self.refused):
            meant = f" If you want the change, set --training.allow_changes {' '.join(self.refused)}."
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} comes from {what}: it has {_in_words(self.refused)}. Use the same, "
            f"or start a new run in another training.output_dir.{meant}"
        )

    def tell(self, checkpoint: Path) -> None:
        """Prints the differences."""
        if self.changed:
            say(f"This run goes on from {str(checkpoint)!r} with changes: it has {_in_words(self.changed)}.")
        if self.told:
            say(
                f"{str(checkpoint)!r} has {_in_words(self.told)}: the checkpoint may have trained on sequences that "
                "are held out now, so the held-out metrics may be too good."
            )
        if self.moves:
            say("The training data differ from the checkpoint's, so this run reads them from the start.")


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the dotted name of each differing field, with both values in words."""
    for section, mine in ours.items():
        other = theirs.get(section)
        if section == "heads":
            yield from _differing_heads(other, mine)
        elif isinstance(other, Mapping) and isinstance(mine, Mapping):
            yield from ((f"{section}.{name}", words) for name, words in _differing_values(other, mine))
        elif section in theirs and other != mine:
            yield section, _pair(other, mine)


def _differing_heads(theirs: Any, ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not isinstance(theirs, Mapping):
        return
    if set(theirs) != set(ours):
        yield "heads", _pair(_few(theirs), _few(ours))
        return
    # Usually all heads differ in the same way: report that once.
    alike: dict[tuple[str, str], list[str]] = {}
    for head, mine in ours.items():
        for difference in _differing_values(theirs[head], mine):
            alike.setdefault(difference, []).append(head)
    for (name, words), heads in alike.items():
        yield f"heads.{name}", words if len(heads) == len(ours) else f"{words} (heads: {_few(heads)})"


def _differing_values(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, mine in ours.items():
        if name in theirs and theirs[name] != mine:
            yield name, _pair(theirs[name], mine)


def _in_words(differences: Mapping[str, str]) -> str:
    return "; ".join(f"{field} {words}" for field, words in differences.items())


def _pair(theirs: Any, ours: Any) -> str:
    there, here = (value if isinstance(value, str) else json.dumps(value) for value in (theirs, ours))
    return f"{there}, this run has {here}"


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names) if len(names) < 6 else f"{', '.join(names[:4])} and {len(names) - 4} more"

"""What differs between a checkpoint and the run that is to go on from it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..processes.agreement import say
from ..recipe.changes import rule_of


# A hash of the rows that a run trains on first: where it alone differs, files have changed under a name that has not.
ROWS = "data.rows"


@dataclass
class Differences:
    """
    What differs between two runs, by what `recipe.changes` says of each field.

    Args:
        refused (`dict[str, str]`): What cannot go on so: by field, what the one has and what the other.
        changed (`dict[str, str]`): What may be another.
        told (`dict[str, str]`): What may be another, but voids a measurement.
        moves (`bool`): Whether a place in the data of the one is no place in that of the other.
    """

    refused: dict[str, str]
    changed: dict[str, str]
    told: dict[str, str]
    moves: bool

    @classmethod
    def between(cls, theirs: Mapping[str, Any], ours: Mapping[str, Any], allowed: Iterable[str] = ()) -> "Differences":
        """
        Compares what two runs are.

        Args:
            theirs (`Mapping[str, Any]`): What a checkpoint says, by section; what it does not say is not compared.
            ours (`Mapping[str, Any]`): The run's.
            allowed (`Iterable[str]`): Fields that may differ though they would be refused, as of
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
            # Another number of held-out sequences leaves others to train on, in another order.
            found.moves = found.moves or rule in ("moves", "tells")
        if found.moves:
            # They are others because something else is, and that is told.
            found.refused.pop(ROWS, None)
        return found

    def refuse(self, checkpoint: Path) -> None:
        """
        Refuses to go on from a checkpoint.

        Raises:
            `InputError`: if something differs that cannot.
        """
        if not self.refused:
            return
        what, meant = "other data" if [*self.refused] == [ROWS] else "another recipe", ""
        if all(rule_of(field) != "fixed" for field in self.refused):
            meant = f" If that is meant, set training.allow_changes to {', '.join(self.refused)}."
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} is of {what}: it has {_in_words(self.refused)}. Use the same, or "
            f"start anew in another training.output_dir.{meant}"
        )

    def tell(self, checkpoint: Path) -> None:
        """Says what is changed."""
        if self.changed:
            say(f"Goes on from {str(checkpoint)!r} with changes: it has {_in_words(self.changed)}.")
        if self.told:
            say(
                f"{str(checkpoint)!r} has {_in_words(self.told)}: sequences that are held out now may have been "
                "trained on before, so that what is measured on them is no measure of what is new."
            )
        if self.moves:
            say("What is to be trained on is not what the checkpoint's run had: it is read from its start.")


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields by their dotted names, with what each side has in words."""
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
    # Most often all heads differ alike, which is said once.
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

"""
Notices that a loss has risen since its best value, which is a sign of a learning rate that is too high.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


# The fraction by which a loss may rise before the run warns: little on held-out tokens, which are the same each time,
# more on training tokens.
_MARGINS = {"eval": 0.01, "train": 0.1}
_TEXTS = {"eval": "held-out", "train": "training"}


class LowestLosses:
    """
    Remembers the lowest value of each training loss, and finds losses that have risen since.

    Args:
        loss (`str`): `"fvu"`, one loss per head; or `"ce"` or `"kl"`, one loss for all heads.
        heads (`Iterable[str]`): Names of all heads of the run.

    Attributes:
        lowest (`dict[str, tuple[float, int]]`): By logged name, the lowest value and its step.
        first (`dict[str, int]`): By logged name, the step of the first value.
    """

    def __init__(self, loss: str, heads: Iterable[str]):
        names = {f"FVU of {head}": f"fvu/{head}" for head in heads}
        self._names = names if loss == "fvu" else {loss.upper(): loss}
        self.lowest: dict[str, tuple[float, int]] = {}
        self.first: dict[str, int] = {}
        self._latest: dict[str, tuple[float, int]] = {}

    def observe(self, values: Mapping[str, float], step: int) -> None:
        """Takes in the logged or held-out values of a step."""
        for key in (f"{when}/{name}" for when in _MARGINS for name in self._names.values()):
            value = values.get(key, math.nan)
            if math.isfinite(value):
                self._latest[key] = value, step
                self.first.setdefault(key, step)
                if key not in self.lowest or value < self.lowest[key][0]:
                    self.lowest[key] = value, step

    def state_dict(self) -> dict[str, Any]:
        """Returns the values that a checkpoint saves."""
        return {"lowest": self.lowest, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the values that a checkpoint saved."""
        self.lowest, self.first = dict(state["lowest"]), dict(state["first"])

    def rises(self) -> Iterator[str]:
        """Yields a warning for each risen loss: on held-out text if measured more than once, else on training text."""
        for words, name in self._names.items():
            now, step = self._latest.get(f"eval/{name}", (math.nan, 0))
            when = "eval" if self.first.get(f"eval/{name}", step) < step else "train"
            best, at = self.lowest.get(f"{when}/{name}", (math.nan, 0))
            now, _ = self._latest.get(f"{when}/{name}", (math.nan, 0))
            if now > best * (1 + _MARGINS[when]):
                yield (
                    f"{words} on {_TEXTS[when]} text has risen: the best was {best:.4f} at step {at:,}, now it is "
                    f"{now:.4f}. --training.save_best true keeps the best heads; a lower learning rate helps."
                )

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


# By how much of itself a loss may rise before it is told: hardly on held-out tokens, which are the same each time, and
# more on those of training.
_MARGINS = {"eval": 0.01, "train": 0.1}
_TEXTS = {"eval": "held-out", "train": "training"}


class LowestLosses:
    """
    How low the losses that a run trains by have been, and whether they have risen since.

    Args:
        loss (`str`): `"fvu"`, of each head; or `"ce"` or `"kl"`, which heads share.
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
        """Takes note of what was logged, or measured on held-out tokens, after a step."""
        for key in (f"{when}/{name}" for when in _MARGINS for name in self._names.values()):
            value = values.get(key, math.nan)
            if math.isfinite(value):
                self._latest[key] = value, step
                self.first.setdefault(key, step)
                if key not in self.lowest or value < self.lowest[key][0]:
                    self.lowest[key] = value, step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"lowest": self.lowest, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what a checkpoint kept."""
        self.lowest, self.first = dict(state["lowest"]), dict(state["first"])

    def rises(self) -> Iterator[str]:
        """A line for each loss that has risen: on held-out text if that was measured before, else on training text."""
        for words, name in self._names.items():
            now, step = self._latest.get(f"eval/{name}", (math.nan, 0))
            when = "eval" if self.first.get(f"eval/{name}", step) < step else "train"
            best, at = self.lowest.get(f"{when}/{name}", (math.nan, 0))
            now, _ = self._latest.get(f"{when}/{name}", (math.nan, 0))
            if now > best * (1 + _MARGINS[when]):
                yield (
                    f"{words} on {_TEXTS[when]} text has risen since its best: {best:.4f} at step {at:,}, {now:.4f} "
                    "now. training.save_best keeps the best; a lower learning rate helps."
                )

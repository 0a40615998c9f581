from collections import defaultdict
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor


class StepSums:
    """Sums the heads' measurements of one optimizer step or evaluation over micro-batches, on the device."""

    def __init__(self) -> None:
        self.by_head: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, measured: dict[str, dict[str, Tensor]]) -> None:
        """Adds the bank's measurements of a micro-batch, by head and quantity."""
        for name, values in measured.items():
            sums = self.by_head[name]
            for quantity, value in values.items():
                sums[quantity] = sums[quantity] + value if quantity in sums else value

    def total(self, sum_over_processes: Callable[[list[Tensor]], list[Tensor]]) -> None:
        """Replaces this process's sums by the sums over all processes."""
        places = [(name, quantity) for name, sums in self.by_head.items() for quantity in sums]
        totals = sum_over_processes([self.by_head[name][quantity] for name, quantity in places])
        for (name, quantity), value in zip(places, totals, strict=True):
            self.by_head[name][quantity] = value


class FiringCounts:
    """Counts, for each head, the tokens since the last flush on which each latent was active."""

    def __init__(self) -> None:
        self.uses: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def add(self, uses: dict[str, Tensor], tokens: dict[str, Tensor]) -> None:
        """Adds one step's uses of each latent, `(num_latents,)`, and the tokens that reached the head, `()`."""
        for name, value in uses.items():
            self.uses[name] = self.uses[name] + value if name in self.uses else value
            self.tokens[name] = self.tokens[name] + tokens[name] if name in self.tokens else tokens[name]

    def load(self, head: str, uses: Tensor, tokens: Tensor) -> None:
        """Restores a head's counts from a checkpoint: `uses` `(num_latents,)` and `tokens` `()`."""
        self.uses[head], self.tokens[head] = uses, tokens

    def flush(self) -> dict[str, Tensor]:
        """Returns the fraction of tokens on which each latent was active, `(num_latents,)`, and clears the counts."""
        fractions = {name: uses / self.tokens[name].clamp_min(1) for name, uses in self.uses.items()}
        self.uses, self.tokens = {}, {}
        return fractions


class RunningMeans:
    """Averages logged values over the steps since the last log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds the values of one step, `()` each."""
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.steps += 1

    def load(self, sums: Mapping[str, float], steps: int, heads: Container[str], device: torch.device) -> None:
        """Restores sums over `steps` steps from a checkpoint: of the LM, and of the heads of this process."""
        for key, value in sums.items():
            _, _, *head = key.split("/", 2)
            if not head or head[0] in heads:
                self.sums[key] = torch.tensor(value, device=device)
        self.steps = steps

    def flush(self) -> dict[str, float]:
        """Returns the means, and clears the sums."""
        if not self.steps:
            return {}
        means = torch.stack(list(self.sums.values())) / self.steps
        values = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.steps = {}, 0
        return values

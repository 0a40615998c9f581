"""
The data-dependent start of new heads: their biases and thresholds follow from the first activations.

The first batches give the mean of the activations that each head reads and predicts, over all processes. A bias that
starts at this mean spares the head to learn it. A learnt threshold starts where `k` latents are active on average.
"""

import torch
from torch import Tensor

from ..activations.running_lm import ActivationSource
from ..activations.trained_rows import NonFiniteAt
from ..bank.bank import SaeBank, joined
from ..bank.moments import Moments
from ..common.errors import InputError, NotFinite
from ..data.batches import Batches, Position
from ..lm.hooks import Site
from ..processes.agreement import gather_objects
from ..spread.base import Spread
from .finite_steps import MOST_IN_A_ROW
from .step import over_processes


def start_heads(bank: SaeBank, spread: Spread, activations: ActivationSource, batches: Batches) -> None:
    """
    Sets the biases and the learnt thresholds of new heads, from the first window of batches in which a token trains.

    Args:
        bank (`SaeBank`): The heads of this process, not yet prepared.
        spread ([`Spread`]): How heads are spread over processes.
        activations (`Callable`): Makes activations from a batch of tokens.
        batches ([`Batches`]): The training data.

    Raises:
        `InputError`: if no token of the data trains.
        `NotFinite`: if no token trains because no activation is finite.
    """
    moments, window = _first_moments(spread, activations, batches)
    for name, head in bank.named_heads():
        plan = bank.plans[name]
        read, target = (Moments.joined([moments[site] for site in sites]) for sites in (plan.reads, plan.predicts))
        head.initialize_biases(read.mean, target.mean)
    _start_thresholds(bank, spread, activations, window)


def _first_moments(
    spread: Spread, activations: ActivationSource, batches: Batches
) -> tuple[dict[Site, Moments], list[dict[str, Tensor]]]:
    """The first window in which a token trains: the moments of each site over all processes, and the batches."""
    moments: dict[Site, Moments] = {}
    for count, (window, position) in enumerate(batches.windows(Position()), 1):
        bad: NonFiniteAt | None = None
        for batch in window:
            found = activations(batch)
            bad = bad or found.non_finite_at
            new = {site: Moments.of(rows) for site, rows in found.by_site.items()}
            for site, one in over_processes(spread, new).items():
                moments[site] = moments[site].merge(one) if site in moments else one
        # Any site is enough: an expert that no token reaches keeps its first values.
        everyone = gather_objects((any(m.count > 0 for m in moments.values()), bad))
        if any(trains for trains, _ in everyone):
            return moments, window
        bad = next((place for _, place in everyone if place is not None), None)
        if bad is not None and (position.epoch or count == MOST_IN_A_ROW):
            raise NotFinite(
                f"No activation at {bad.place} is finite in the tokens of the first {count} steps. {bad.cause}"
            )
        if position.epoch:
            raise InputError("No token of the training data trains: all are padding or in data.exclude_tokens.")
    raise AssertionError("windows come without end")


def _start_thresholds(
    bank: SaeBank, spread: Spread, activations: ActivationSource, window: list[dict[str, Tensor]]
) -> None:
    """
    Sets each learnt threshold to the mean over processes of its start on the first batch of a window in which a token
    trains.
    """
    waiting = {name: head for name, head in bank.named_heads() if head.learns_threshold}
    for batch in window:
        if not any(gather_objects(bool(waiting))):
            return
        by_site = activations(batch).by_site
        for name, head in list(waiting.items()):
            tokens = joined(by_site, bank.plans[name].reads)  # (tokens, d_in)
            head.initialize_threshold(tokens)
            share, count = spread.sum([head.threshold.detach() * len(tokens), tokens.new_tensor(len(tokens)).float()])
            if count > 0:
                with torch.no_grad():
                    head.threshold.copy_(share / count)
                del waiting[name]

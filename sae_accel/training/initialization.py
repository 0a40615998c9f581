"""Where new heads start: their biases and thresholds follow from the first activations, over all processes."""

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
    Sets the biases of new heads, and thresholds that are learnt, by the first step's batches in which some token
    trains.

    Args:
        bank (`SaeBank`): The heads of this process, not yet prepared.
        spread ([`Spread`]): How heads lie on processes.
        activations (`Callable`): Where activations come from.
        batches ([`Batches`]): The training data.

    Raises:
        `InputError`: if no token of the data trains.
        `NotFinite`: if none does since no activation is finite.
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
    """The moments, over all processes, of the first window in which some token trains, and its batches."""
    moments: dict[Site, Moments] = {}
    for count, (window, position) in enumerate(batches.windows(Position()), 1):
        bad: NonFiniteAt | None = None
        for batch in window:
            found = activations(batch)
            bad = bad or found.non_finite_at
            new = {site: Moments.of(rows) for site, rows in found.by_site.items()}
            for site, one in over_processes(spread, new).items():
                moments[site] = moments[site].merge(one) if site in moments else one
        # An expert that no token reaches starts where it is.
        everyone = gather_objects((any(m.count > 0 for m in moments.values()), bad))
        if any(trains for trains, _ in everyone):
            return moments, window
        bad = next((place for _, place in everyone if place is not None), None)
        if bad is not None and (position.epoch or count == MOST_IN_A_ROW):
            raise NotFinite(f"No activation at {bad.place} is finite in the first {count} steps' tokens. {bad.cause}")
        if position.epoch:
            raise InputError("No token of the training data trains: padding and data.exclude_tokens leave none.")
    raise AssertionError("windows come without end")


def _start_thresholds(
    bank: SaeBank, spread: Spread, activations: ActivationSource, window: list[dict[str, Tensor]]
) -> None:
    """
    Sets a threshold that is learnt to the mean, over processes, of where it begins on the first batch of a window in
    which some token trains.
    """
    waiting = {name: head for name, head in bank.named_heads() if head.learns_threshold}
    for batch in window:
        if not any(gather_objects(bool(waiting))):
            return
        by_site = activations(batch).by_site
        for name, head in list(waiting.items()):
            tokens = joined(by_site, bank.plans[name].reads)
            head.initialize_threshold(tokens)
            share, count = spread.sum([head.threshold.detach() * len(tokens), tokens.new_tensor(len(tokens)).float()])
            if count > 0:
                with torch.no_grad():
                    head.threshold.copy_(share / count)
                del waiting[name]

"""Where new heads start: their biases and thresholds follow from the first activations, over all processes."""

import torch
from torch import Tensor

from ..activations.running_lm import ActivationSource
from ..bank.bank import SaeBank, joined
from ..bank.moments import Moments
from ..common.errors import InputError
from ..data.batches import Batches, Position
from ..lm.hooks import Site
from ..processes.agreement import gather_objects
from ..spread.base import Spread
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
    """
    moments: dict[Site, Moments] = {}
    for window, position in batches.windows(Position()):
        if position.epoch:
            raise InputError("No token of the training data trains: padding and data.exclude_tokens leave none.")
        for batch in window:
            new = {site: Moments.of(rows) for site, rows in activations(batch).by_site.items()}
            for site, one in over_processes(spread, new).items():
                moments[site] = moments[site].merge(one) if site in moments else one
        # An expert that no token reaches starts where it is.
        if any(gather_objects(any(m.count > 0 for m in moments.values()))):
            break
    for name, head in bank.named_heads():
        plan = bank.plans[name]
        read, target = (Moments.joined([moments[site] for site in sites]) for sites in (plan.reads, plan.predicts))
        head.initialize_biases(read.mean, target.mean)
    _start_thresholds(bank, spread, activations, window[0])


def _start_thresholds(bank: SaeBank, spread: Spread, activations: ActivationSource, batch: dict[str, Tensor]) -> None:
    """Sets a threshold that is learnt to the mean, over processes, of where it begins on one batch."""
    learnt = {name: head for name, head in bank.named_heads() if head.learns_threshold}
    if not any(gather_objects(bool(learnt))):
        return
    by_site = activations(batch).by_site
    for name, head in learnt.items():
        tokens = joined(by_site, bank.plans[name].reads)
        head.initialize_threshold(tokens)
        share, count = spread.sum([head.threshold.detach() * len(tokens), tokens.new_tensor(len(tokens))])
        with torch.no_grad():
            head.threshold.copy_(share / count.clamp_min(1))

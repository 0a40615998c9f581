"""
The measurements of one optimizer step, from the sums of each process to totals over all processes.

Moments and sums are added up first, over micro-batches and processes, and divided only at the end. So no result
depends on how tokens are cut into batches or spread over processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..activations.trained_rows import Activations, NonFiniteAt
from ..bank.bank import LOSSES, SaeBank
from ..bank.moments import Moments
from ..lm.hooks import Site
from ..spread.base import Spread
from .sums import StepSums


@dataclass
class StepResult:
    """
    The measurements of an optimizer step, over all processes.

    Args:
        num_tokens (`torch.Tensor` of shape `()`): Trained tokens.
        head_tokens (`dict[str, torch.Tensor]`): By head, the tokens that reached it, `()`.
        uses (`dict[str, torch.Tensor]`): By head, the number of tokens on which each latent was active,
            `(num_latents,)`.
        smallest_acts (`dict[str, torch.Tensor]`): By head with `batchtopk`, the smallest activation of a batch, as a
            mean over tokens, `()`.
        values (`dict[str, torch.Tensor]`): The values to log, by name, `()` each.
        non_finite (`torch.Tensor` of shape `()`): Tokens that were left out because an activation is not finite.
        non_finite_at ([`NonFiniteAt`], *optional*): The first place where this process found one.
        unsure (`torch.Tensor` of shape `()`): Above zero if numbers that are not finite may have taken part.
    """

    num_tokens: Tensor
    head_tokens: dict[str, Tensor]
    uses: dict[str, Tensor]
    smallest_acts: dict[str, Tensor]
    values: dict[str, Tensor]
    non_finite: Tensor
    non_finite_at: NonFiniteAt | None
    unsure: Tensor


class TokenCount:
    """
    Counts the tokens of a step or an evaluation: the tokens of this process, or the tokens that its heads see.

    Args:
        device (`torch.device`): The heads' device.

    Attributes:
        trained (`torch.Tensor` of shape `()`): Tokens that count.
        non_finite (`torch.Tensor` of shape `()`): Tokens that were left out because an activation is not finite.
        non_finite_at ([`NonFiniteAt`], *optional*): The first place where this process found one.
        unsure (`torch.Tensor` of shape `()`): Above zero if further tokens that are not finite may have taken part.
    """

    def __init__(self, device: torch.device):
        self.trained, self.non_finite, self.unsure = (torch.zeros((), device=device) for _ in range(3))
        self.non_finite_at: NonFiniteAt | None = None

    def add(self, activations: Activations) -> None:
        """Adds the tokens of a batch."""
        self.trained += activations.num_tokens
        self.non_finite += activations.non_finite
        self.non_finite_at = self.non_finite_at or activations.non_finite_at
        if activations.unsure is not None:
            self.unsure += activations.unsure


def merge_moments(moments: dict[Site, Moments], bank: SaeBank, activations: Activations) -> None:
    """Adds the moments of a batch, for each site that a head predicts."""
    for site in dict.fromkeys(site for plan in bank.plans.values() for site in plan.predicts):
        new = Moments.of(activations.by_site[site])  # of (tokens, width)
        moments[site] = moments[site].merge(new) if site in moments else new


def over_processes(spread: Spread, moments: dict[Site, Moments]) -> dict[Site, Moments]:
    """The moments of each site over the tokens of all processes."""
    counts = spread.sum([own.count for own in moments.values()])  # () each
    sums = spread.sum([own.mean * own.count for own in moments.values()])  # (width,) each
    means = [total / count.clamp_min(1) for total, count in zip(sums, counts, strict=True)]
    # Total variance = variances within processes + variance of their means about the common mean.
    between = [own.count * (own.mean - mean).pow(2).sum() for own, mean in zip(moments.values(), means, strict=True)]
    variances = spread.sum([own.total_variance + part for own, part in zip(moments.values(), between, strict=True)])
    return {site: Moments(*of) for site, of in zip(moments, zip(counts, means, variances, strict=True), strict=True)}


def step_result(
    spread: Spread,
    sums: StepSums,
    tokens: TokenCount,
    head_tokens: dict[str, Tensor],
    scale: Mapping[str, Tensor] = MappingProxyType({}),
) -> StepResult:
    """
    Sums the measurements of a step over all processes.

    Args:
        spread ([`Spread`]): Sums over processes.
        sums (`StepSums`): The heads' measurements on this process.
        tokens (`TokenCount`): The tokens of this process, or the tokens that its heads see.
        head_tokens (`dict[str, torch.Tensor]`): By head, the tokens of all processes that reached it, `()`.
        scale (`Mapping[str, torch.Tensor]`, *optional*): By head, the factor of its losses, `()`; 1 if not given.
    """
    sums.total(spread.sum)
    values: dict[str, Tensor] = {}
    for name, measured in sums.by_head.items():
        for part in LOSSES:
            if part in measured:
                values[f"train/{part}/{name}"] = measured[part] * scale.get(name, 1.0)
        values[f"train/l0/{name}"] = measured["active"] / head_tokens[name].clamp_min(1)
    uses = {name: measured["uses"] for name, measured in sums.by_head.items()}  # (num_latents,) each
    smallest = {
        name: measured["smallest_act"] / head_tokens[name].clamp_min(1)
        for name, measured in sums.by_head.items()
        if "smallest_act" in measured
    }
    trained, lost, unsure = spread.sum([tokens.trained, tokens.non_finite, tokens.unsure])
    return StepResult(trained, head_tokens, uses, smallest, values, lost, tokens.non_finite_at, unsure)


def positive(variance: Tensor) -> Tensor:
    """The variance, or 1 where it is 0, so that a division works even for equal tokens or no tokens."""
    return torch.where(variance > 0, variance, 1.0)

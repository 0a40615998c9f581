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
    What an optimizer step was taken on, over all processes.

    Args:
        num_tokens (`torch.Tensor` of shape `()`): Tokens that trained.
        head_tokens (`dict[str, torch.Tensor]`): By head, those that reached it.
        uses (`dict[str, torch.Tensor]`): By head, activations above zero of each latent, `(num_latents,)`.
        smallest_acts (`dict[str, torch.Tensor]`): By head with `batchtopk`, the mean over tokens of the smallest
            activation of the batch that they were in, `()`.
        values (`dict[str, torch.Tensor]`): What is logged, by name.
        non_finite (`torch.Tensor` of shape `()`): Tokens that were left out because an activation is not finite.
        non_finite_at ([`NonFiniteAt`], *optional*): Where this process found the first such activation.
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
    Tokens of a step or an evaluation on this process, or those that its heads have seen.

    Args:
        device (`torch.device`): Of the heads.

    Attributes:
        trained (`torch.Tensor` of shape `()`): Those that count.
        non_finite (`torch.Tensor` of shape `()`): Those that were left out because an activation is not finite.
        non_finite_at ([`NonFiniteAt`], *optional*): Where this process found the first such activation.
        unsure (`torch.Tensor` of shape `()`): Above zero if others may not have been left out.
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
    """Adds, for each site that some head predicts, the moments of a batch."""
    for site in dict.fromkeys(site for plan in bank.plans.values() for site in plan.predicts):
        new = Moments.of(activations.by_site[site])
        moments[site] = moments[site].merge(new) if site in moments else new


def over_processes(spread: Spread, moments: dict[Site, Moments]) -> dict[Site, Moments]:
    """Of the tokens of all processes together."""
    counts = spread.sum([own.count for own in moments.values()])
    sums = spread.sum([own.mean * own.count for own in moments.values()])
    means = [total / count.clamp_min(1) for total, count in zip(sums, counts, strict=True)]
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
    What heads measured in a step, over all processes.

    Args:
        spread ([`Spread`]): Sums over processes.
        sums (`StepSums`): What heads measured on this process.
        tokens (`TokenCount`): Tokens of this process, or those that its heads have seen.
        head_tokens (`dict[str, torch.Tensor]`): By head, tokens of all processes that reached it.
        scale (`Mapping[str, torch.Tensor]`, *optional*): By head, what its losses are multiplied by; 1 if not given.
    """
    sums.total(spread.sum)
    values: dict[str, Tensor] = {}
    for name, measured in sums.by_head.items():
        for part in LOSSES:
            if part in measured:
                values[f"train/{part}/{name}"] = measured[part] * scale.get(name, 1.0)
        values[f"train/l0/{name}"] = measured["active"] / head_tokens[name].clamp_min(1)
    uses = {name: measured["uses"] for name, measured in sums.by_head.items()}
    smallest = {
        name: measured["smallest_act"] / head_tokens[name].clamp_min(1)
        for name, measured in sums.by_head.items()
        if "smallest_act" in measured
    }
    trained, lost, unsure = spread.sum([tokens.trained, tokens.non_finite, tokens.unsure])
    return StepResult(trained, head_tokens, uses, smallest, values, lost, tokens.non_finite_at, unsure)


def positive(variance: Tensor) -> Tensor:
    """A variance that can be divided by: tokens that are all alike, or none at all, have nothing to explain."""
    return torch.where(variance > 0, variance, 1.0)

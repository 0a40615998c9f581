from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..activations.running_lm import Activations
from ..bank.bank import LOSSES, Moments, SaeBank
from ..lm.hooks import Site
from ..spread import Replicated
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
    """

    num_tokens: Tensor
    head_tokens: dict[str, Tensor]
    uses: dict[str, Tensor]
    smallest_acts: dict[str, Tensor]
    values: dict[str, Tensor]


class LocalObjective:
    """
    Each head fits its own target (`loss: fvu`): activations are collected without gradients.

    Args:
        activations (`Callable`): Where activations come from, such as [`RunningLM`].
        accelerator (`Accelerator`): Runs backward passes.
        spread ([`Replicated`]): How heads are spread over processes.
        micro_batches (`int`): Parts of a batch.

    Attributes:
        frequencies (`dict[str, torch.Tensor]`): By head, the fraction of the tokens of the last evaluation on which
            each latent was active, `(num_latents,)`.
        scale (`dict[str, torch.Tensor]`): By head, what the gradients of the last window are yet to be multiplied by.
    """

    def __init__(
        self,
        activations: Callable[[dict[str, Tensor]], Activations],
        accelerator: Accelerator,
        spread: Replicated,
        micro_batches: int,
    ):
        self.activations = activations
        self.accelerator = accelerator
        self.spread = spread
        self.micro_batches = micro_batches
        self.scale: dict[str, Tensor] = {}
        self.frequencies: dict[str, Tensor] = {}

    def gradients(
        self, bank: Any, window: list[dict[str, Tensor]], k: dict[str, int], dead_masks: dict[str, Tensor]
    ) -> StepResult:
        """
        Leaves in the bank's parameters the gradient of the loss on an accumulation window, but for the factors
        `scale`.

        Every squared error is divided by the target's variance over the whole window and all processes. That is known
        only at its end, so gradients are taken with the first batch's variance and then scaled, which is exact.

        Args:
            bank (`SaeBank`, prepared): The heads.
            window (`list[dict]`): Batches of tokens.
            k (`dict[str, int]`): By head, latents that are active for each token.
            dead_masks (`dict[str, torch.Tensor]`): By head, dead latents; heads without AuxK are left out.
        """
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        moments: dict[Site, Moments] = {}
        reference: dict[str, Tensor] = {}
        sums, num_tokens = StepSums(), torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(window):
            activations = self.activations(batch)
            num_tokens += activations.num_tokens
            merge_moments(moments, heads, activations)
            last = i == len(window) - 1
            if i == 0 or last:
                totals = self.target_moments(moments, heads)
            if i == 0:
                reference = {name: positive(m.variance) for name, m in totals.items()}
            if last:
                # Before the last backward pass, with which DeepSpeed takes its step.
                self.scale |= {name: reference[name] / positive(m.variance) for name, m in totals.items()}
            for j, part in enumerate(activations.split(self.micro_batches)):
                losses = partial(
                    SaeBank.local_losses, by_site=part.by_site, total_variance=reference, k=k, dead_masks=dead_masks
                )
                with self.spread.synchronized(bank, last and j == self.micro_batches - 1):
                    output = bank(losses)
                    self.accelerator.backward(output["loss"] * self.spread.gradient_factor)
                sums.add(output["heads"])
        head_tokens = {name: m.count for name, m in totals.items()}
        return step_result(self.spread, sums, num_tokens, head_tokens, self.scale)

    @torch.no_grad()
    def evaluate(self, bank: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """FVU, L0 and the part of latents that stay silent, by head, over all processes."""
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        k = {name: head.config.k for name, head in heads.named_heads()}
        unit = {name: torch.ones((), device=self.accelerator.device) for name in k}
        moments: dict[Site, Moments] = {}
        sums, num_tokens = StepSums(), torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            activations = self.activations(batch)
            num_tokens += activations.num_tokens
            merge_moments(moments, heads, activations)
            for part in activations.split(self.micro_batches):
                losses = partial(SaeBank.local_losses, by_site=part.by_site, total_variance=unit, k=k, dead_masks={})
                sums.add(bank(losses)["heads"])
        sums.total(self.spread.sum)
        totals = self.target_moments(moments, heads)
        metrics: dict[str, float] = {}
        for name, values in sums.by_head.items():
            self.frequencies[name] = values["uses"] / totals[name].count.clamp_min(1)
            silent = self.spread.over_latents((values["uses"] == 0).sum())
            metrics[f"eval/fvu/{name}"] = (values["fvu"] / positive(totals[name].variance)).item()
            metrics[f"eval/l0/{name}"] = (values["active"] / totals[name].count.clamp_min(1)).item()
            metrics[f"eval/silent/{name}"] = silent.item() / heads.plans[name].config.num_latents
        metrics["eval/tokens"] = int(self.spread.sum([num_tokens])[0])
        return self.spread.merged(metrics)

    def target_moments(self, moments: dict[Site, Moments], bank: SaeBank) -> dict[str, Moments]:
        """By head, the moments of its target over all processes."""
        totals = over_processes(self.spread, moments)
        return {name: totals[plan.predicts] for name, plan in bank.plans.items()}


def merge_moments(moments: dict[Site, Moments], bank: SaeBank, activations: Activations) -> None:
    """Adds, for each site that some head predicts, the moments of a batch."""
    for site in dict.fromkeys(plan.predicts for plan in bank.plans.values()):
        new = Moments.of(activations.by_site[site])
        moments[site] = moments[site].merge(new) if site in moments else new


def over_processes(spread: Replicated, moments: dict[Site, Moments]) -> dict[Site, Moments]:
    """Of the tokens of all processes together."""
    counts = spread.sum([own.count for own in moments.values()])
    sums = spread.sum([own.mean * own.count for own in moments.values()])
    means = [total / count.clamp_min(1) for total, count in zip(sums, counts, strict=True)]
    between = [own.count * (own.mean - mean).pow(2).sum() for own, mean in zip(moments.values(), means, strict=True)]
    variances = spread.sum([own.variance + part for own, part in zip(moments.values(), between, strict=True)])
    return {site: Moments(*of) for site, of in zip(moments, zip(counts, means, variances, strict=True), strict=True)}


def step_result(
    spread: Replicated,
    sums: StepSums,
    num_tokens: Tensor,
    head_tokens: dict[str, Tensor],
    scale: Mapping[str, Tensor] = MappingProxyType({}),
) -> StepResult:
    """
    What heads measured in a step, over all processes.

    Args:
        spread ([`Replicated`]): Sums over processes.
        sums (`StepSums`): What heads measured on this process.
        num_tokens (`torch.Tensor` of shape `()`): Tokens of this process, or those that its heads have seen.
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
    return StepResult(spread.sum([num_tokens])[0], head_tokens, uses, smallest, values)


def positive(variance: Tensor) -> Tensor:
    """A variance that can be divided by: tokens that are all alike, or none at all, have nothing to explain."""
    return torch.where(variance > 0, variance, 1.0)

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .activations import Activations, RunningLM
from .bank import Moments, SaeBank
from .hooks import Site
from .running_means import StepSums


@dataclass
class StepResult:
    """
    What an optimizer step was taken on, over all processes.

    Args:
        num_tokens (`torch.Tensor` of shape `()`): Tokens that trained.
        head_tokens (`dict[str, torch.Tensor]`): By head, those that reached it.
        uses (`dict[str, torch.Tensor]`): By head, activations above zero of each latent, `(num_latents,)`.
        values (`dict[str, torch.Tensor]`): What is logged, by name.
    """

    num_tokens: Tensor
    head_tokens: dict[str, Tensor]
    uses: dict[str, Tensor]
    values: dict[str, Tensor]


class LocalObjective:
    """
    Each head fits its own target (`loss: fvu`): activations are collected without gradients.

    Args:
        activations (`RunningLM`): Where activations come from.
        accelerator (`Accelerator`): Runs backward passes and reduces over processes.
        micro_batches (`int`): Parts of a batch.
    """

    def __init__(self, activations: RunningLM, accelerator: Accelerator, micro_batches: int):
        self.activations = activations
        self.accelerator = accelerator
        self.micro_batches = micro_batches

    def gradients(
        self, bank: Any, window: list[dict[str, Tensor]], k: dict[str, int], dead_masks: dict[str, Tensor]
    ) -> StepResult:
        """
        Leaves in the bank's parameters the gradient of the loss on an accumulation window.

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
            if i == 0:
                totals = self.target_moments(moments, heads)
                reference = {name: positive(m.variance) for name, m in totals.items()}
            for j, part in enumerate(activations.split(self.micro_batches)):

                def losses(heads: SaeBank, by_site=part.by_site, reference=reference) -> dict:
                    return heads.local_losses(by_site, reference, k, dead_masks)

                with synchronized(self.accelerator, bank, i == len(window) - 1 and j == self.micro_batches - 1):
                    output = bank(losses)
                    # DDP takes the mean over processes, where the loss is a sum over all their tokens.
                    self.accelerator.backward(output["loss"] * self.accelerator.num_processes)
                sums.add(output["heads"])
        if len(window) > 1:
            totals = self.target_moments(moments, heads)
        scale = {name: reference[name] / positive(m.variance) for name, m in totals.items()}
        if len(window) > 1:
            _scale_gradients(heads, scale)
        num_tokens = self.accelerator.reduce(num_tokens, "sum")
        return step_result(self.accelerator, sums, num_tokens, {name: m.count for name, m in totals.items()}, scale)

    @torch.no_grad()
    def evaluate(self, bank: SaeBank, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """FVU, L0 and the part of latents that stay silent, by head, over all processes."""
        k = {name: head.config.k for name, head in bank.named_heads()}
        unit = {name: torch.ones((), device=self.accelerator.device) for name in k}
        moments: dict[Site, Moments] = {}
        sums, num_tokens = StepSums(), torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            activations = self.activations(batch)
            num_tokens += activations.num_tokens
            merge_moments(moments, bank, activations)
            for part in activations.split(self.micro_batches):
                sums.add(bank.local_losses(part.by_site, unit, k, {})["heads"])
        sums.reduce(self.accelerator)
        totals = self.target_moments(moments, bank)
        metrics: dict[str, float] = {}
        for name, values in sums.by_head.items():
            metrics[f"eval/fvu/{name}"] = (values["fvu"] / positive(totals[name].variance)).item()
            metrics[f"eval/l0/{name}"] = (values["active"] / totals[name].count.clamp_min(1)).item()
            metrics[f"eval/silent/{name}"] = (values["uses"] == 0).float().mean().item()
        metrics["eval/tokens"] = int(self.accelerator.reduce(num_tokens, "sum"))
        return metrics

    def target_moments(self, moments: dict[Site, Moments], bank: SaeBank) -> dict[str, Moments]:
        """By head, the moments of its target over all processes."""
        totals = {site: reduced(self.accelerator, own) for site, own in moments.items()}
        return {name: totals[plan.predicts] for name, plan in bank.plans.items()}


def merge_moments(moments: dict[Site, Moments], bank: SaeBank, activations: Activations) -> None:
    """Adds, for each site that some head predicts, the moments of a batch on this process."""
    for site in dict.fromkeys(plan.predicts for plan in bank.plans.values()):
        new = Moments.of(activations.by_site[site])
        moments[site] = moments[site].merge(new) if site in moments else new


def reduced(accelerator: Accelerator, moments: Moments) -> Moments:
    """Of all processes together."""
    if accelerator.num_processes == 1:
        return moments
    count = accelerator.reduce(moments.count, "sum")
    mean = accelerator.reduce(moments.mean * moments.count, "sum") / count.clamp_min(1)
    between = moments.count * (moments.mean - mean).pow(2).sum()
    return Moments(count, mean, accelerator.reduce(moments.variance + between, "sum"))


def synchronized(accelerator: Accelerator, bank: Any, last: bool) -> Any:
    """Gradients meet across processes in the last backward pass of a step only."""
    accelerator.sync_gradients = last
    return nullcontext() if last else accelerator.no_sync(bank)


def step_result(
    accelerator: Accelerator,
    sums: StepSums,
    num_tokens: Tensor,
    head_tokens: dict[str, Tensor],
    scale: Mapping[str, Tensor] = MappingProxyType({}),
) -> StepResult:
    """
    What heads measured in a step, over all processes.

    Args:
        accelerator (`Accelerator`): Reduces.
        sums (`StepSums`): What heads measured on this process.
        num_tokens (`torch.Tensor` of shape `()`): Tokens of all processes.
        head_tokens (`dict[str, torch.Tensor]`): By head, tokens of all processes that reached it.
        scale (`Mapping[str, torch.Tensor]`, *optional*): By head, what its losses are multiplied by; 1 if not given.
    """
    sums.reduce(accelerator)
    values: dict[str, Tensor] = {}
    for name, measured in sums.by_head.items():
        for part in ("fvu", "auxk_loss", "multi_topk_fvu"):
            if part in measured:
                values[f"train/{part}/{name}"] = measured[part] * scale.get(name, 1.0)
        values[f"train/l0/{name}"] = measured["active"] / head_tokens[name].clamp_min(1)
    uses = {name: measured["uses"] for name, measured in sums.by_head.items()}
    return StepResult(num_tokens, head_tokens, uses, values)


def positive(variance: Tensor) -> Tensor:
    """A variance that can be divided by: tokens that are all alike, or none at all, have nothing to explain."""
    return torch.where(variance > 0, variance, 1.0)


def _scale_gradients(bank: SaeBank, scale: dict[str, Tensor]) -> None:
    for name, head in bank.named_heads():
        for parameter in head.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale[name])

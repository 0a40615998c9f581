"""
The local loss: each head reconstructs its own target, and the LM runs without gradients.

One forward pass of the LM gives the activations of all heads. Each batch is cut into micro-batches, so that the heads'
work needs less memory. The loss is linear in tokens: any cut into batches, micro-batches and processes gives the same
gradient.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from ..activations.running_lm import ActivationSource
from ..bank.bank import SaeBank
from ..bank.moments import Moments
from ..lm.hooks import Site
from ..spread.base import Spread
from .step import StepResult, TokenCount, merge_moments, over_processes, positive, step_result
from .sums import StepSums


class LocalObjective:
    """
    The local loss (`loss: fvu`): each head fits its own target, from activations without gradients.

    Args:
        activations (`Callable`): Makes activations from a batch of tokens, for instance [`RunningLM`].
        spread ([`Spread`]): How heads are spread over processes. Its accelerator runs the backward passes.
        micro_batches (`int`): The number of parts of a batch.
        scale (`dict[str, torch.Tensor]`, *optional*): By head, the factor of the last window's gradients, `()`. The
            objective sets it, and the optimizer multiplies by it.

    Attributes:
        frequencies (`dict[str, torch.Tensor]`): By head, the fraction of the tokens of the last evaluation on which
            each latent was active, `(num_latents,)`.
    """

    def __init__(
        self,
        activations: ActivationSource,
        spread: Spread,
        micro_batches: int,
        scale: dict[str, Tensor] | None = None,
    ):
        self.activations = activations
        self.spread = spread
        self.accelerator = spread.accelerator
        self.micro_batches = micro_batches
        self.scale = {} if scale is None else scale
        self.frequencies: dict[str, Tensor] = {}
        # Called between the batches of a window. It raises to stop a run there.
        self.between_batches: Callable[[], None] = _go_on

    def gradients(
        self,
        bank: nn.Module,
        window: list[dict[str, Tensor]],
        k: dict[str, int],
        dead_masks: dict[str, Tensor],
        careful: bool = True,
    ) -> StepResult:
        """
        Adds the gradient of the loss on an accumulation window to the bank's parameters, still without the factors
        `scale`.

        Each squared error is divided by the target's variance over the whole window and all processes. This variance
        is known only at the end of the window, so gradients are first divided by the first batch's variance, and the
        optimizer multiplies them by the quotient of the two. The result is exact.

        Args:
            bank (`SaeBank`, prepared): The heads.
            window (`list[dict]`): Batches with `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
            k (`dict[str, int]`): By head, the number of active latents per token.
            dead_masks (`dict[str, torch.Tensor]`): By head with AuxK, which latents are dead, `(num_latents,)`.
            careful (`bool`, defaults to `True`): Whether to leave out each token that is not finite, for which the
                host waits for the device. If False, the result says whether there may have been one.

        Returns:
            [`StepResult`]: the measurements of the window, over all processes.
        """
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        moments: dict[Site, Moments] = {}
        reference: dict[str, Tensor] = {}
        sums, tokens = StepSums(), TokenCount(self.accelerator.device)
        for i, batch in enumerate(window):
            if i:
                self.between_batches()
            activations = self.activations(batch, careful)  # by site, (tokens, width)
            tokens.add(activations)
            merge_moments(moments, heads, activations)
            last = i == len(window) - 1
            if i == 0 or last:
                totals = self.target_moments(moments, heads)
            if i == 0:
                reference = {name: positive(m.total_variance) for name, m in totals.items()}  # () each
            if last:
                self.scale |= {name: reference[name] / positive(m.total_variance) for name, m in totals.items()}
            for j, part in enumerate(activations.split(self.micro_batches)):
                losses = partial(
                    SaeBank.local_losses, by_site=part.by_site, total_variance=reference, k=k, dead_masks=dead_masks
                )
                with self.spread.synchronized(bank, last and j == self.micro_batches - 1):
                    output = bank(losses)
                    self.spread.backward(output["loss"] * self.spread.gradient_factor)
                sums.add(output["heads"])
        head_tokens = {name: m.count for name, m in totals.items()}  # () each
        return step_result(self.spread, sums, tokens, head_tokens, self.scale)

    @torch.no_grad()
    def evaluate(self, bank: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Measures FVU, L0 and the fraction of silent latents of each head, over all processes."""
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        k = {name: head.config.trained_k for name, head in heads.named_heads()}
        unit = {name: torch.ones((), device=self.accelerator.device) for name in k}
        moments: dict[Site, Moments] = {}
        sums, tokens = StepSums(), TokenCount(self.accelerator.device)
        for batch in batches:
            activations = self.activations(batch)
            tokens.add(activations)
            merge_moments(moments, heads, activations)
            for part in activations.split(self.micro_batches):
                losses = partial(SaeBank.local_losses, by_site=part.by_site, total_variance=unit, k=k, dead_masks={})
                sums.add(bank(losses)["heads"])
        sums.total(self.spread.sum)
        totals = self.target_moments(moments, heads)
        metrics: dict[str, float] = {}
        for name, values in sums.by_head.items():
            self.frequencies[name] = values["uses"] / totals[name].count.clamp_min(1)  # (num_latents,)
            silent = self.spread.over_latents((values["uses"] == 0).sum())
            # NaN without a measured token: 0 over the least divisor would look like the best value of all.
            measured = {
                "fvu": values["fvu"] / positive(totals[name].total_variance),
                "l0": values["active"] / totals[name].count,
                "silent": silent / heads.plans[name].config.num_latents,
            }
            some = bool(totals[name].count > 0)
            metrics |= {f"eval/{key}/{name}": value.item() if some else math.nan for key, value in measured.items()}
        trained, lost = self.spread.sum([tokens.trained, tokens.non_finite])
        metrics["eval/tokens"] = int(trained)
        if lost > 0:
            metrics["eval/non_finite_tokens"] = int(lost)
        return self.spread.merged(metrics)

    def target_moments(self, moments: dict[Site, Moments], bank: SaeBank) -> dict[str, Moments]:
        """The moments of each head's target over all processes."""
        totals = over_processes(self.spread, moments)
        return {name: Moments.joined([totals[site] for site in plan.predicts]) for name, plan in bank.plans.items()}


def _go_on() -> None:
    """Lets the window go on; the trainer puts its check for signals here."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.bank import SaeBank
from ..bank.moments import Moments
from ..lm.hooks import Site
from .local_objective import LocalObjective
from .spliced_lm import SplicedHeads, SplicedLM
from .step import StepResult, merge_moments, positive, step_result
from .sums import StepSums


class EndToEndObjective:
    """
    Heads are spliced into the LM, and the loss is on its logits (`loss: ce` or `kl`), with `fvu_weight` times the sum
    of the local losses added. See arXiv:2405.12241.

    Args:
        lm (`SplicedLM`): The LM.
        local (`LocalObjective`): Measures heads on the clean LM.
        loss (`str`): `"ce"` or `"kl"`.
        fvu_weight (`float`): Weight of the local losses; 0 leaves them out.
    """

    def __init__(self, lm: SplicedLM, local: LocalObjective, loss: str, fvu_weight: float):
        self.lm = lm
        self.local = local
        self.accelerator = local.accelerator
        self.spread = local.spread
        self.scale = local.scale
        self.loss = loss
        self.fvu_weight = fvu_weight

    def gradients(
        self, bank: nn.Module, window: list[dict[str, Tensor]], k: dict[str, int], dead_masks: dict[str, Tensor]
    ) -> StepResult:
        """
        Leaves in the bank's parameters the gradient of the loss on an accumulation window.

        The loss is a mean over the tokens of the whole window and all processes. A local loss is divided by the clean
        activations' variance over as many, and its gradient stays with its own head. The arguments are those of
        [`LocalObjective`].
        """
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        counts = {loss: self._total(window, loss) for loss in ("ce", "kl")}
        divisors = {loss: count.clamp_min(1) for loss, count in counts.items()}
        variances = self._variances(heads, window) if self.fvu_weight else {}
        sums, logit_sums = StepSums(), StepSums()
        parts = [part for batch in window for part in _split(batch, self.local.micro_batches)]
        for i, part in enumerate(parts):
            if i:
                self.local.between_batches()
            clean = self.lm.clean(part) if self.loss == "kl" else None
            with self.spread.synchronized(bank, i == len(parts) - 1):
                output = bank(partial(self._losses, part, clean, k, variances, dead_masks))
                loss = output["logits"][self.loss] / divisors[self.loss] + self.fvu_weight * output["local_loss"]
                self.accelerator.backward(loss * self.spread.gradient_factor)
            sums.add(output["heads"])
            logit_sums.add({"lm": {name: value.detach() for name, value in output["logits"].items()}})
        head_tokens = {name: counts["kl"] for name, _ in heads.named_heads()}
        own_tokens = torch.stack([self.lm.counts(batch, "kl") for batch in window]).sum()
        result = step_result(self.spread, sums, own_tokens, head_tokens)
        logit_sums.total(self.spread.sum)
        for name, value in logit_sums.by_head["lm"].items():
            result.values[f"train/{name}"] = value / divisors["kl" if name == "kl" else "ce"]
        return result

    @property
    def between_batches(self) -> Callable[[], None]:
        """Called between the batches of a window, where a run that is to stop leaves it."""
        return self.local.between_batches

    @between_batches.setter
    def between_batches(self, call: Callable[[], None]) -> None:
        self.local.between_batches = call

    @property
    def frequencies(self) -> dict[str, Tensor]:
        """By head, the fraction of the tokens of the last evaluation on which each latent was active."""
        return self.local.frequencies

    @torch.no_grad()
    def evaluate(self, bank: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """
        Mean CE of the clean LM and with all heads spliced in, KL between the two, and what [`LocalObjective`]
        measures.
        """
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        k = {name: head.config.trained_k for name, head in heads.named_heads()}
        sums, counts = StepSums(), StepSums()

        def measure() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                for part in _split(batch, self.local.micro_batches):
                    output = bank(partial(self._losses, part, self.lm.clean(part), k, {}, {}))
                    sums.add({"lm": output["logits"]})
                counts.add({"lm": {loss: self.lm.counts(batch, loss) for loss in ("ce", "kl")}})
                yield batch

        metrics = self.local.evaluate(bank, measure())
        sums.total(self.spread.sum)
        counts.total(self.spread.sum)
        for name, value in sums.by_head["lm"].items():
            count = counts.by_head["lm"]["kl" if name == "kl" else "ce"]
            metrics[f"eval/{name}"] = (value / count.clamp_min(1)).item()
        return metrics

    def _losses(
        self,
        batch: dict[str, Tensor],
        clean: Tensor | None,
        k: dict[str, int],
        variances: dict[str, Tensor],
        dead_masks: dict[str, Tensor],
        bank: SaeBank,
    ) -> dict[str, Any]:
        """One spliced pass: losses on the logits, the heads' own if there are variances, and what heads measured."""
        heads = SplicedHeads(bank, batch, self.lm.exclude_tokens, k, variances, dead_masks)
        logits = self.lm(batch, heads, clean)
        local_loss = torch.stack(heads.local_losses).sum() if heads.local_losses else 0.0
        return {"logits": logits, "local_loss": local_loss, "heads": heads.measured}

    def _variances(self, bank: SaeBank, window: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """By head, the total variance of its target in the LM without heads, over the window and all processes."""
        moments: dict[Site, Moments] = {}
        for batch in window:
            self.local.between_batches()
            merge_moments(moments, bank, self.local.activations(batch))
        return {name: positive(m.total_variance) for name, m in self.local.target_moments(moments, bank).items()}

    def _total(self, window: list[dict[str, Tensor]], loss: str) -> Tensor:
        """Tokens whose loss is counted, over the window and all processes."""
        count = torch.stack([self.lm.counts(batch, loss) for batch in window]).sum()
        return self.spread.sum([count.float()])[0]


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """A batch cut by sequences; some parts may be empty, so that every process has as many."""
    pieces = {key: value.tensor_split(parts) for key, value in batch.items()}
    return [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]

"""
The end-to-end loss: all heads are spliced into the LM, and its logits decide how good they are.

For each part of a batch the LM runs with the heads in it. With `loss: kl`, with local losses and in an evaluation it
also runs once without heads (the clean LM), for comparison. The gradient flows from the logits through the frozen LM
into all heads, and into a LoRA if there is one. Every sum runs over all micro-batches and processes before it is
divided, so that neither the number of processes nor that of micro-batches changes the loss.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.trained_rows import NonFiniteAt
from ..bank.bank import SaeBank
from ..bank.moments import Moments
from ..lm.hooks import Site
from .local_objective import LocalObjective
from .spliced_lm import SplicedHeads, SplicedLM
from .step import StepResult, TokenCount, merge_moments, positive, step_result
from .sums import StepSums


class EndToEndObjective:
    """
    The loss on the logits of an LM with all heads spliced in (`loss: ce` or `kl`), plus `fvu_weight` times the sum of
    the local losses. See arXiv:2405.12241.

    Args:
        lm (`SplicedLM`): The LM.
        local (`LocalObjective`): Measures the heads on the clean LM, which has no heads in it.
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
        self,
        bank: nn.Module,
        window: list[dict[str, Tensor]],
        k: dict[str, int],
        dead_masks: dict[str, Tensor],
        careful: bool = True,
    ) -> StepResult:
        """
        Adds the gradient of the loss on an accumulation window to the bank's parameters. The arguments are the same as
        in [`LocalObjective.gradients`].

        The loss is a mean over the tokens of the whole window and all processes. A local loss is divided by the
        variance of the clean activations over the same tokens, and its gradient reaches only its own head.

        A sequence with a token that is not finite is left out whole. Without local losses it is found only when its
        pass runs, so the gradient is scaled at the end by the tokens that are left.
        """
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        sums, logit_sums, tokens = StepSums(), StepSums(), _Kept(self.accelerator.device)
        variances: dict[str, Tensor] = {}
        if self.fvu_weight:
            variances, seen = self._variances(heads, window, careful)
            tokens.unsure += seen.unsure
            # The sum makes every process decide alike, since all run the same collectives.
            if careful and not bool(self.spread.sum([seen.non_finite])[0] == 0):
                window = [self._finite_part(heads, batch, tokens) for batch in window]
                variances, _ = self._variances(heads, window, careful)
        counts = {loss: self._total(window, loss) for loss in ("ce", "kl")}  # () each
        divisors = {loss: count.clamp_min(1) for loss, count in counts.items()}
        self.scale.clear()
        parts = [part for batch in window for part in _split(batch, self.local.micro_batches)]
        for i, part in enumerate(parts):
            if i:
                self.local.between_batches()
            with self.spread.synchronized(bank, i == len(parts) - 1):
                losses = partial(self._losses, k=k, variances=variances, dead_masks=dead_masks)
                output = self._pass(bank, part, self.loss == "kl", losses, tokens, careful)
                loss = output["logits"][self.loss] / divisors[self.loss] + self.fvu_weight * output["local_loss"]
                self.spread.backward(loss * self.spread.gradient_factor)
            sums.add(output["heads"])
            logit_sums.add({"lm": {name: value.detach() for name, value in output["logits"].items()}})
        if tokens.lost:
            left = dict(zip(divisors, self.spread.sum([tokens.counts[loss] for loss in divisors]), strict=True))
            counts, kept = left, {loss: count.clamp_min(1) for loss, count in left.items()}
            factor = divisors[self.loss] / kept[self.loss]
            self.scale |= dict.fromkeys([*(name for name, _ in heads.named_heads()), "lora"], factor)
            divisors = kept
        head_tokens = {name: counts["kl"] for name, _ in heads.named_heads()}
        result = step_result(self.spread, sums, tokens, head_tokens)
        logit_sums.total(self.spread.sum)
        for name, value in logit_sums.by_head["lm"].items():
            result.values[f"train/{name}"] = value / divisors["kl" if name == "kl" else "ce"]
        return result

    @property
    def between_batches(self) -> Callable[[], None]:
        """The function that is called between the batches of a window; it raises to stop a run there."""
        return self.local.between_batches

    @between_batches.setter
    def between_batches(self, call: Callable[[], None]) -> None:
        self.local.between_batches = call

    @property
    def frequencies(self) -> dict[str, Tensor]:
        """The fraction of tokens of the last evaluation on which each latent was active, `(num_latents,)`, by head."""
        return self.local.frequencies

    @torch.no_grad()
    def evaluate(self, bank: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """
        Measures the mean CE of the clean LM, the mean CE with all heads spliced in, the KL between the two, and the
        metrics of [`LocalObjective.evaluate`].
        """
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        k = {name: head.config.trained_k for name, head in heads.named_heads()}
        sums, tokens = StepSums(), _Kept(self.accelerator.device)

        losses = partial(self._losses, k=k, variances={}, dead_masks={})

        def measure() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                for part in _split(batch, self.local.micro_batches):
                    output = self._pass(bank, part, True, losses, tokens, careful=True)
                    sums.add({"lm": output["logits"]})
                yield batch

        metrics = self.local.evaluate(bank, measure())
        sums.total(self.spread.sum)
        counts = dict(zip(tokens.counts, self.spread.sum(list(tokens.counts.values())), strict=True))
        for name, value in sums.by_head["lm"].items():
            count = counts["kl" if name == "kl" else "ce"]
            # Without a measured token 0 / 0 gives NaN, as it should.
            metrics[f"eval/{name}"] = (value / count).item()
        return metrics

    def _pass(
        self,
        bank: nn.Module,
        part: dict[str, Tensor],
        with_clean: bool,
        losses: Callable[..., dict[str, Any]],
        tokens: "_Kept",
        careful: bool,
    ) -> dict[str, Any]:
        """Runs `_losses` on a part of a batch; if `careful`, once more on the finite sequences if any are not."""
        clean = self.lm.clean(part) if with_clean else None  # (batch, ctx_len, d_model)
        output = bank(partial(losses, batch=part, clean=clean))
        if not careful:
            tokens.unsure += ~output["finite"]
        # The sum makes every process decide alike, since a head may lie on several.
        elif not bool(self.spread.sum([output["finite"].float()])[0] == self.accelerator.num_processes):
            part = self._finite_part(self.accelerator.unwrap_model(bank), part, tokens)
            clean = self.lm.clean(part) if with_clean else None
            output = bank(partial(losses, batch=part, clean=clean))
        tokens.keep({loss: self.lm.counts(part, loss) for loss in tokens.counts})
        return output

    def _losses(
        self,
        bank: SaeBank,
        batch: dict[str, Tensor],
        clean: Tensor | None,
        k: dict[str, int],
        variances: dict[str, Tensor],
        dead_masks: dict[str, Tensor],
    ) -> dict[str, Any]:
        """Runs one spliced pass: losses on the logits, local losses if `variances` is not empty, and measurements."""
        heads = SplicedHeads(bank, batch, self.lm.exclude_tokens, k, variances, dead_masks)
        logits = self.lm(batch, heads, clean)  # () each, summed over tokens
        local_loss = torch.stack(heads.local_losses).sum() if heads.local_losses else 0.0
        values = [value.detach() for value in logits.values()]
        finite = torch.stack([*(value.isfinite() for value in values), *heads.finite]).all()
        return {"logits": logits, "local_loss": local_loss, "heads": heads.measured, "finite": finite}

    def _finite_part(self, bank: SaeBank, batch: dict[str, Tensor], tokens: "_Kept") -> dict[str, Tensor]:
        """The sequences of a batch that are finite in the clean LM; counts the others as left out."""
        sites = list(dict.fromkeys(site for plan in bank.plans.values() for site in (*plan.reads, *plan.predicts)))
        finite, place = self.lm.finite_sequences(batch, sites)  # (batch,)
        part = {key: value[finite] for key, value in batch.items()}
        tokens.leave_out(self.lm.counts(batch, "kl") - self.lm.counts(part, "kl"), place)
        return part

    def _variances(
        self, bank: SaeBank, window: list[dict[str, Tensor]], careful: bool
    ) -> tuple[dict[str, Tensor], TokenCount]:
        """
        The total variance of each head's target in the clean LM, `()`, over the window and all processes; and the
        tokens of this process.
        """
        moments: dict[Site, Moments] = {}
        tokens = TokenCount(self.accelerator.device)
        for batch in window:
            self.local.between_batches()
            activations = self.local.activations(batch, careful)
            tokens.add(activations)
            merge_moments(moments, bank, activations)
        totals = self.local.target_moments(moments, bank)
        return {name: positive(m.total_variance) for name, m in totals.items()}, tokens

    def _total(self, window: list[dict[str, Tensor]], loss: str) -> Tensor:
        """The number of tokens whose loss counts, `()`, over the window and all processes."""
        count = torch.stack([self.lm.counts(batch, loss) for batch in window]).sum()
        return self.spread.sum([count.float()])[0]


class _Kept(TokenCount):
    """
    The tokens of finite sequences.

    Attributes:
        counts (`dict[str, torch.Tensor]`): By loss, the number of tokens whose loss counts, `()`.
        lost (`bool`): Whether any process has left sequences out.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.counts = {loss: torch.zeros((), device=device) for loss in ("ce", "kl")}
        self.lost = False

    def keep(self, counts: dict[str, Tensor]) -> None:
        self.trained += counts["kl"]
        self.counts = {loss: self.counts[loss] + count for loss, count in counts.items()}

    def leave_out(self, count: Tensor, place: NonFiniteAt | None) -> None:
        self.non_finite += count
        self.non_finite_at = self.non_finite_at or place
        self.lost = True


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Cuts a batch by sequences into `parts`; a part may be empty, so that every process has the same number."""
    pieces = {key: value.tensor_split(parts) for key, value in batch.items()}
    return [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]

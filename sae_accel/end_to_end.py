from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .activations import without_cache
from .bank import Moments, SaeBank, measured
from .data import token_mask
from .errors import InputError
from .hookpoints import HeadPlan
from .hooks import Site
from .local import LocalObjective, StepResult, merge_moments, positive, step_result, synchronized
from .logit_loss import IGNORED, LogitLoss
from .models import HeadModel
from .running_means import StepSums
from .splicing import Replacement, replaced


class SplicedLM:
    """
    The LM with the heads of a bank in it, up to the losses on its logits.

    Args:
        model (`PreTrainedModel`): A causal LM. An adapter that it carries for training is off in clean passes.
        exclude_tokens (`list[int]`): Token ids at which nothing is spliced or measured.
        adapter (*optional*): A PEFT model around it, whose adapter is trained.

    Raises:
        `InputError`: if the LM has no head.
    """

    def __init__(self, model: PreTrainedModel, exclude_tokens: list[int], adapter: Any = None):
        self.losses = LogitLoss(model)
        self.model = model
        self.exclude_tokens = exclude_tokens
        self.adapter = adapter
        self.options = without_cache(model.base_model)

    def counts(self, batch: dict[str, Tensor], loss: str) -> Tensor:
        """Tokens of a batch whose loss is counted: for `ce` those with a next token, for `kl` all."""
        return (self.labels(batch) != IGNORED).sum() if loss == "ce" else token_mask(batch, self.exclude_tokens).sum()

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """By token the next one, `(batch, ctx_len)`; `IGNORED` where either is padding or excluded, and at the end."""
        mask = token_mask(batch, self.exclude_tokens)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        both = mask[:, :-1] & mask[:, 1:]
        labels[:, :-1] = batch["input_ids"][:, 1:].masked_fill(~both, IGNORED)
        return labels

    @torch.no_grad()
    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states before the LM's head, `(batch, ctx_len, d_model)`, of the LM as it was."""
        with self.adapter.disable_adapter() if self.adapter is not None else nullcontext(), _full_precision(batch):
            return self.losses.hidden_states(**batch, **self.options)

    def __call__(
        self, batch: dict[str, Tensor], replacements: Iterable[Replacement], clean: Tensor | None = None
    ) -> dict[str, Tensor]:
        """
        Losses of the LM with `replacements` in it, in nats, summed over tokens.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
            replacements (`Iterable[Replacement]`): What heads do.
            clean (`torch.Tensor` of shape `(batch, ctx_len, d_model)`, *optional*): Hidden states of the clean LM;
                with them KL is measured and trained by, and without them CE.
        """
        mask = token_mask(batch, self.exclude_tokens)
        with _full_precision(batch):
            with replaced(self.model.base_model, replacements):
                hidden = self.losses.hidden_states(**batch, **self.options)
            return self.losses(hidden[mask], self.labels(batch)[mask], None if clean is None else clean[mask])


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
        self.accelerator: Accelerator = local.accelerator
        self.loss = loss
        self.fvu_weight = fvu_weight

    def gradients(
        self, bank: Any, window: list[dict[str, Tensor]], k: dict[str, int], dead_masks: dict[str, Tensor]
    ) -> StepResult:
        """
        Leaves in the bank's parameters the gradient of the loss on an accumulation window.

        The loss is a mean over the tokens of the whole window and all processes. A local loss is divided by the clean
        activations' variance over as many, and its gradient stays with its own head.

        Args:
            bank (`SaeBank`, prepared): The heads.
            window (`list[dict]`): Batches of tokens.
            k (`dict[str, int]`): By head, latents that are active for each token.
            dead_masks (`dict[str, torch.Tensor]`): By head, dead latents; heads without AuxK are left out.
        """
        heads: SaeBank = self.accelerator.unwrap_model(bank)
        counts = {loss: self._total(window, loss) for loss in ("ce", "kl")}
        variances = self._variances(heads, window) if self.fvu_weight else {}
        sums, logit_sums = StepSums(), StepSums()
        parts = [part for batch in window for part in _split(batch, self.local.micro_batches)]
        for i, part in enumerate(parts):
            clean = self.lm.clean(part) if self.loss == "kl" else None
            with synchronized(self.accelerator, bank, i == len(parts) - 1):
                output = bank(partial(self._losses, part, clean, k, variances, dead_masks))
                loss = output["logits"][self.loss] / counts[self.loss] + self.fvu_weight * output["local_loss"]
                # DDP takes the mean over processes, where the loss is a sum over all their tokens.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            sums.add(output["heads"])
            logit_sums.add({"lm": {name: value.detach() for name, value in output["logits"].items()}})
        head_tokens = {name: counts["kl"] for name, _ in heads.named_heads()}
        unit = {name: torch.ones((), device=counts["kl"].device) for name in head_tokens}
        local_tokens = sum(self.lm.counts(batch, "kl") for batch in window)
        result = step_result(self.accelerator, sums, local_tokens, head_tokens, unit)
        logit_sums.reduce(self.accelerator)
        for name, value in logit_sums.by_head["lm"].items():
            result.values[f"train/{name}"] = value / counts["kl" if name == "kl" else "ce"]
        return result

    @torch.no_grad()
    def evaluate(self, bank: SaeBank, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """
        Mean CE of the clean LM and with all heads spliced in, KL between the two, and what [`LocalObjective`]
        measures.
        """
        k = {name: head.config.k for name, head in bank.named_heads()}
        sums, counts = StepSums(), StepSums()

        def measure() -> Iterator[dict[str, Tensor]]:
            for batch in batches:
                for part in _split(batch, self.local.micro_batches):
                    sums.add({"lm": self._losses(part, self.lm.clean(part), k, {}, {}, bank)["logits"]})
                counts.add({"lm": {loss: self.lm.counts(batch, loss) for loss in ("ce", "kl")}})
                yield batch

        metrics = self.local.evaluate(bank, measure())
        sums.reduce(self.accelerator), counts.reduce(self.accelerator)
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
        """One spliced pass: losses on the logits, local losses if there are variances, and what heads measured."""
        mask = token_mask(batch, self.lm.exclude_tokens)
        rows = None if mask.all() else mask.flatten().nonzero().squeeze(-1)
        # What stands at padding is never read; what stands at an excluded token must be the LM's own.
        excluded = bool((batch["attention_mask"].bool() & ~mask).any())
        local_losses: list[Tensor] = []
        heads: dict[str, dict[str, Tensor]] = {}
        autocast = _autocast_of(batch)

        def through(name: str, head: HeadModel, plan: HeadPlan) -> Replacement:
            options = {
                "k": k[name],
                "total_variance": variances.get(name),
                "dead_mask": dead_masks.get(name) if variances else None,
                "auxk_alpha": plan.arguments.auxk_alpha,
                "multi_topk": plan.arguments.multi_topk and bool(variances),
            }

            def compute(activations: Tensor, original: Tensor | None) -> Tensor:
                read = _rows(activations, rows).to(head.b_dec.device)
                target = None if original is None else _rows(original, rows).to(read.device).detach()
                # A head's local loss must not reach the heads before it, which shaped what it reads.
                apart = bool(variances) and read.requires_grad
                with autocast():
                    output = head(read, target, return_loss=bool(variances) and not apart, **options)
                    own = head(read.detach(), target, **options) if apart else output
                if variances:
                    local_losses.append(own.loss)
                heads[name] = measured(own, head.num_latents)
                return _with_rows(output.reconstruction, activations, original, rows)

            return Replacement(name, plan.hookpoint, plan.reads, compute, lambda: excluded or bool(variances))

        named = [through(name, head, bank.plans[name]) for name, head in bank.named_heads()]
        logits = self.lm(batch, named, clean)
        local_loss = torch.stack(local_losses).sum() if local_losses else 0.0
        return {"logits": logits, "local_loss": local_loss, "heads": heads}

    def _variances(self, bank: SaeBank, window: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """By head, the total variance of its target in the LM without heads, over the window and all processes."""
        moments: dict[Site, Moments] = {}
        for batch in window:
            merge_moments(moments, bank, self.local.activations(batch))
        return {name: positive(m.variance) for name, m in self.local.target_moments(moments, bank).items()}

    def _total(self, window: list[dict[str, Tensor]], loss: str) -> Tensor:
        """Tokens whose loss is counted, over the window and all processes; at least 1, to divide by."""
        count = torch.stack([self.lm.counts(batch, loss) for batch in window]).sum()
        return self.accelerator.reduce(count, "sum").clamp_min(1).float()


def check_end_to_end(plans: Iterable[HeadPlan]) -> None:
    """
    Checks that heads can be spliced into an LM together.

    Raises:
        `InputError`: if two sit at one hookpoint, or a hookpoint may run any number of times.
    """
    seen: dict[str, str] = {}
    for plan in plans:
        if plan.hookpoint in seen:
            raise InputError(
                f"training.loss: heads {seen[plan.hookpoint]!r} and {plan.name!r} would both replace the output of "
                f"{plan.hookpoint!r}. With ce or kl a hookpoint takes one head; train the other in another run."
            )
        seen[plan.hookpoint] = plan.name
        if plan.predicts.within is not None:
            raise InputError(
                f"training.loss: {plan.hookpoint!r} may run any number of times in a forward pass, so no head can be "
                "spliced in for it. Use loss: fvu, or another hookpoint."
            )


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """A batch cut by sequences, without empty parts."""
    pieces = {key: value.tensor_split(parts) for key, value in batch.items()}
    cut = [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]
    return [part for part in cut if len(part["input_ids"])]


def _rows(activations: Tensor, rows: Tensor | None) -> Tensor:
    flat = activations.reshape(-1, activations.shape[-1])
    return flat if rows is None else flat[rows.to(flat.device)]


def _with_rows(reconstruction: Tensor, activations: Tensor, original: Tensor | None, rows: Tensor | None) -> Tensor:
    """The module's own output, or nothing where it was not run, with the rows of the tokens that count exchanged."""
    shape = (*activations.shape[:-1], reconstruction.shape[-1])
    reconstruction = reconstruction.to(activations.device, activations.dtype)
    if rows is None:
        return reconstruction.view(shape)
    base = activations.new_zeros(shape) if original is None else original
    return base.reshape(-1, shape[-1]).index_copy(0, rows.to(base.device), reconstruction).view(shape)


def _full_precision(batch: dict[str, Tensor]) -> torch.autocast:
    """The LM runs in its own precision; autocast, which the bank is prepared with, is for the heads."""
    return torch.autocast(batch["input_ids"].device.type, enabled=False)


def _autocast_of(batch: dict[str, Tensor]) -> Any:
    """Makes the present autocast anew, for use where it has been turned off."""
    kind = batch["input_ids"].device.type
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))

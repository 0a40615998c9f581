from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..activations.running_lm import without_cache
from ..activations.trained_rows import NonFiniteAt
from ..bank.bank import SaeBank, measured
from ..data.collate import text_mask
from ..lm.hooks import Site, base_of, record
from ..lm.logit_loss import IGNORED, LogitLoss
from ..lm.positions import without_unknown_positions
from ..lm.splice import Replacement, replaced
from ..ops.finite import finite_rows, surely_finite


if TYPE_CHECKING:
    from peft import PeftModel


class SplicedLM:
    """
    The LM with the heads of a bank in it, up to the losses on its logits.

    Args:
        model (`PreTrainedModel`): A causal LM. An adapter that it carries for training is off in clean passes.
        exclude_tokens (`list[int]`): Token ids at which nothing is spliced or measured.
        adapter (`PeftModel`, *optional*): A PEFT model around it, whose adapter is trained.

    Raises:
        `InputError`: if the LM has no head.
    """

    def __init__(self, model: PreTrainedModel, exclude_tokens: list[int], adapter: "PeftModel | None" = None):
        self.losses = LogitLoss(model)
        self.model = model
        self.exclude_tokens = exclude_tokens
        self.adapter = adapter
        self.base_model = base_of(model)
        self.options = without_cache(self.base_model)

    def counts(self, batch: dict[str, Tensor], loss: str) -> Tensor:
        """Tokens of a batch whose loss is counted: for `ce` those with a next token, for `kl` all."""
        return (self.labels(batch) != IGNORED).sum() if loss == "ce" else text_mask(batch, self.exclude_tokens).sum()

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """By token the next one, `(batch, ctx_len)`; `IGNORED` where either is padding or excluded, and at the end."""
        mask = text_mask(batch, self.exclude_tokens)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        both = mask[:, :-1] & mask[:, 1:]
        labels[:, :-1] = batch["input_ids"][:, 1:].masked_fill(~both, IGNORED)
        return labels

    @torch.no_grad()
    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states before the LM's head, `(batch, ctx_len, d_model)`, of the LM as it was."""
        if not len(batch["input_ids"]):
            return torch.zeros(*batch["input_ids"].shape, 1, device=batch["input_ids"].device)
        with self.adapter.disable_adapter() if self.adapter is not None else nullcontext(), _full_precision(batch):
            return self.losses.hidden_states(**self._inputs(batch)).to(batch["input_ids"].device)

    @torch.no_grad()
    def finite_sequences(self, batch: dict[str, Tensor], sites: list[Site]) -> tuple[Tensor, NonFiniteAt | None]:
        """
        In which sequences every token that counts is finite in the LM as it was. A token that is not makes NaN of the
        others of its sequence, by attention and its gradient.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
            sites (`list[Site]`): Where to look, beside the last hidden state.

        Returns:
            `tuple[torch.BoolTensor, NonFiniteAt]`: by sequence, `(batch,)`, and the first place where one is not.
        """
        mask = text_mask(batch, self.exclude_tokens)
        finite, first = torch.ones(len(mask), dtype=torch.bool, device=mask.device), None

        def look(place: NonFiniteAt, activations: Tensor) -> None:
            nonlocal finite, first
            rows = activations.reshape(-1, activations.shape[-1])
            if len(rows) == mask.numel():
                now = (finite_rows(rows).to(mask.device).view(mask.shape) | ~mask).all(1)
                first = first if first is not None or bool(now.all()) else place
                finite = finite & now

        with record(base_of(self.model), sites, lambda site, found: look(NonFiniteAt.of(site, found.dtype), found)):
            hidden = self.clean(batch)
        look(NonFiniteAt("the LM's last hidden state", str(hidden.dtype).removeprefix("torch.")), hidden)
        return finite, first

    def __call__(
        self, batch: dict[str, Tensor], heads: "SplicedHeads", clean: Tensor | None = None
    ) -> dict[str, Tensor]:
        """
        Losses of the LM with `heads` in it, in nats, summed over tokens.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
            heads ([`SplicedHeads`]): What is spliced in.
            clean (`torch.Tensor` of shape `(batch, ctx_len, d_model)`, *optional*): Hidden states of the clean LM;
                with them KL is measured and trained by, and without them CE.
        """
        mask = text_mask(batch, self.exclude_tokens)
        with _full_precision(batch):
            if not len(mask):
                nothing = torch.zeros(0, 1, device=mask.device) + heads.without_tokens()
                return self.losses(nothing, batch["input_ids"].flatten(), None if clean is None else nothing.detach())
            with replaced(base_of(self.model), heads.replacements()):
                # An LM may be spread over devices; its hidden states come back to where the tokens are.
                hidden = self.losses.hidden_states(**self._inputs(batch)).to(mask.device)
            heads.finite.append(surely_finite(hidden[mask]).all())
            return self.losses(hidden[mask], self.labels(batch)[mask], None if clean is None else clean[mask])

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {**without_unknown_positions(self.base_model, batch), **self.options}


class SplicedHeads:
    """
    The heads of a bank at work inside one forward pass of an LM, and what they measure there.

    Args:
        bank (`SaeBank`): The heads.
        batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
        exclude_tokens (`list[int]`): Token ids at which the LM's own activation stays.
        k (`dict[str, int]`): By head, latents that are active for each token.
        variances (`dict[str, torch.Tensor]`, *optional*): By head, what its own losses are divided by; without them
            there are none.
        dead_masks (`dict[str, torch.Tensor]`, *optional*): By head, dead latents; heads without AuxK are left out.

    Attributes:
        local_losses (`list[torch.Tensor]`): The heads' own losses.
        measured (`dict[str, dict[str, torch.Tensor]]`): By head, what `bank.measured` gives.
        finite (`list[torch.Tensor]`): Whether what was read, and came out of the LM, is finite, each `()`.
    """

    def __init__(
        self,
        bank: SaeBank,
        batch: dict[str, Tensor],
        exclude_tokens: list[int],
        k: dict[str, int],
        variances: dict[str, Tensor] | None = None,
        dead_masks: dict[str, Tensor] | None = None,
    ):
        mask = text_mask(batch, exclude_tokens)
        self.bank, self.k, self.device = bank, k, mask.device
        self.variances, self.dead_masks = variances or {}, dead_masks or {}
        self.rows = None if mask.all() else mask.flatten().nonzero().squeeze(-1)
        # What stands at padding is never read; what stands at an excluded token must be the LM's own.
        self.keeps_some = bool((batch["attention_mask"].bool() & ~mask).any())
        self.autocast = _autocast_of(batch)
        self.local_losses: list[Tensor] = []
        self.measured: dict[str, dict[str, Tensor]] = {}
        self.finite: list[Tensor] = []

    def replacements(self) -> Iterator[Replacement]:
        """For each head, the exchange of its hookpoint's output."""
        # A module that is replaced runs only if some of its output is needed.
        needs_output = self.keeps_some or bool(self.variances)
        for name, plan in self.bank.plans.items():
            (reads,) = plan.reads
            yield Replacement(name, plan.hookpoint, reads, partial(self._reconstruct, name), needs_output)

    def without_tokens(self) -> Tensor:
        """
        Zero, `()`, by way of every parameter: a process whose data has ended must still take part where gradients, or
        pieces of heads, meet those of others.
        """
        total = sum((parameter.sum() * 0 for parameter in self.bank.adapter), torch.zeros((), device=self.device))
        for name, plan in self.bank.plans.items():
            read, original = (
                torch.zeros(0, width, device=self.device) for width in (plan.config.d_in, plan.config.d_out)
            )
            total = total + self._reconstruct(name, read, original).sum()
        return total

    def _reconstruct(self, name: str, activations: Tensor, original: Tensor | None) -> Tensor:
        head, entry = dict(self.bank.named_heads())[name], self.bank.plans[name].arguments
        read = self._tokens(activations).to(head.b_dec.device)
        self.finite.append(surely_finite(read.detach()).all().to(self.device))
        with self.autocast():
            if not self.variances:
                output = own = head(read, k=self.k[name], return_loss=False)
            else:
                assert original is not None, "what is measured runs its module"
                # A head's local loss must not reach the heads before it, which shaped what it reads.
                own = head(
                    read.detach(),
                    self._tokens(original).to(read.device).detach(),
                    k=self.k[name],
                    total_variance=self.variances[name],
                    dead_mask=self.dead_masks.get(name),
                    **entry.loss_terms,
                )
                self.local_losses.append(own.loss)
                output = head(read, k=self.k[name], return_loss=False) if read.requires_grad else own
        self.measured[name] = measured(own, head)
        return self._placed(output.reconstruction, activations, original)

    def _tokens(self, activations: Tensor) -> Tensor:
        """Activations `(num_tokens, d)` of the tokens that count."""
        flat = activations.reshape(-1, activations.shape[-1])
        return flat if self.rows is None else flat[self.rows.to(flat.device)]

    def _placed(self, reconstruction: Tensor, activations: Tensor, original: Tensor | None) -> Tensor:
        """The module's own output, or zeros where it was not run, with the tokens that count exchanged."""
        shape = (*activations.shape[:-1], reconstruction.shape[-1])
        if self.rows is None:
            return reconstruction.to(activations.device).view(shape)
        around = activations.new_zeros(shape) if original is None else original
        reconstruction = reconstruction.to(around.device, around.dtype)
        return around.reshape(-1, shape[-1]).index_copy(0, self.rows.to(around.device), reconstruction).view(shape)


def _full_precision(batch: dict[str, Tensor]) -> torch.autocast:
    """The LM runs in its own precision; autocast, which the bank is prepared with, is for the heads."""
    return torch.autocast(batch["input_ids"].device.type, enabled=False)


def _autocast_of(batch: dict[str, Tensor]) -> Callable[[], AbstractContextManager[object]]:
    """Makes the present autocast anew, for use where it has been turned off."""
    kind = batch["input_ids"].device.type
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))

"""
The LM with heads spliced in: at each hookpoint the head's reconstruction takes the place of the module's output.

`SplicedLM` runs the LM, with heads or clean, and computes the losses on its logits. `SplicedHeads` lives for one
forward pass: it holds the batch's mask, replaces the hookpoints' outputs and collects each head's measurements. At an
excluded token the LM keeps its own activation.
"""

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
    An LM with the heads of a bank in it, up to the losses on its logits.

    Args:
        model (`PreTrainedModel`): A causal LM.
        exclude_tokens (`list[int]`): Token ids at which nothing is spliced or measured.
        adapter (`PeftModel`, *optional*): A PEFT model around the LM, whose adapter trains; off in clean passes.

    Raises:
        `InputError`: if the LM has no LM head.
    """

    def __init__(self, model: PreTrainedModel, exclude_tokens: list[int], adapter: "PeftModel | None" = None):
        self.losses = LogitLoss(model)
        self.model = model
        self.exclude_tokens = exclude_tokens
        self.adapter = adapter
        self.base_model = base_of(model)
        self.options = without_cache(self.base_model)

    def counts(self, batch: dict[str, Tensor], loss: str) -> Tensor:
        """The number of tokens whose loss counts, `()`: for `ce` tokens with a next token, for `kl` all tokens."""
        return (self.labels(batch) != IGNORED).sum() if loss == "ce" else text_mask(batch, self.exclude_tokens).sum()

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """The next token of each token, `(batch, ctx_len)`; `IGNORED` at the end, or if one is padding or excluded."""
        mask = text_mask(batch, self.exclude_tokens)  # (batch, ctx_len)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        both = mask[:, :-1] & mask[:, 1:]  # (batch, ctx_len - 1)
        labels[:, :-1] = batch["input_ids"][:, 1:].masked_fill(~both, IGNORED)
        return labels

    @torch.no_grad()
    def clean(self, batch: dict[str, Tensor]) -> Tensor:
        """The clean LM's hidden states before the LM head, `(batch, ctx_len, d_model)`, without heads or LoRA."""
        if not len(batch["input_ids"]):
            return torch.zeros(*batch["input_ids"].shape, 1, device=batch["input_ids"].device)
        with self.adapter.disable_adapter() if self.adapter is not None else nullcontext(), _full_precision(batch):
            return self.losses.hidden_states(**self._inputs(batch)).to(batch["input_ids"].device)

    @torch.no_grad()
    def finite_sequences(self, batch: dict[str, Tensor], sites: list[Site]) -> tuple[Tensor, NonFiniteAt | None]:
        """
        Finds the sequences in which every token that counts is finite in the clean LM. A token that is not finite
        turns the other tokens of its sequence into NaN, through attention and its gradient.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
            sites (`list[Site]`): The sites to check, beside the last hidden state.

        Returns:
            `tuple[torch.BoolTensor, NonFiniteAt]`: whether each sequence is finite, `(batch,)`, and the first place
            where one is not; None if all are.
        """
        mask = text_mask(batch, self.exclude_tokens)  # (batch, ctx_len)
        finite, first = torch.ones(len(mask), dtype=torch.bool, device=mask.device), None

        def look(place: NonFiniteAt, activations: Tensor) -> None:
            nonlocal finite, first
            rows = activations.reshape(-1, activations.shape[-1])  # (batch * ctx_len, width)
            if len(rows) == mask.numel():
                now = (finite_rows(rows).to(mask.device).view(mask.shape) | ~mask).all(1)  # (batch,)
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
        The losses of the LM with `heads` in it, in nats, summed over tokens, `()` each.

        Args:
            batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
            heads ([`SplicedHeads`]): The heads to splice in.
            clean (`torch.Tensor` of shape `(batch, ctx_len, d_model)`, *optional*): The clean LM's hidden states. With
                them the gradient is that of KL, without them that of CE.
        """
        mask = text_mask(batch, self.exclude_tokens)
        with _full_precision(batch):
            if not len(mask):
                nothing = torch.zeros(0, 1, device=mask.device) + heads.without_tokens()
                return self.losses(nothing, batch["input_ids"].flatten(), None if clean is None else nothing.detach())
            with replaced(base_of(self.model), heads.replacements()):
                # The LM may be spread over devices; its hidden states come back to the tokens' device.
                hidden = self.losses.hidden_states(**self._inputs(batch)).to(mask.device)  # (batch, ctx_len, d_model)
            heads.finite.append(surely_finite(hidden[mask]).all())  # hidden[mask]: (tokens, d_model)
            return self.losses(hidden[mask], self.labels(batch)[mask], None if clean is None else clean[mask])

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {**without_unknown_positions(self.base_model, batch), **self.options}


class SplicedHeads:
    """
    The heads of a bank inside one forward pass of an LM, and their measurements in it.

    Args:
        bank (`SaeBank`): The heads.
        batch (`dict[str, torch.Tensor]`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
        exclude_tokens (`list[int]`): Token ids at which the LM keeps its own activation.
        k (`dict[str, int]`): By head, the number of active latents per token.
        variances (`dict[str, torch.Tensor]`, *optional*): By head, the divisor of its local loss, `()`; without
            variances there are no local losses.
        dead_masks (`dict[str, torch.Tensor]`, *optional*): By head with AuxK, dead latents, `(num_latents,)`.

    Attributes:
        local_losses (`list[torch.Tensor]`): The heads' local losses, `()` each.
        measured (`dict[str, dict[str, torch.Tensor]]`): By head, the result of `bank.measured`.
        finite (`list[torch.Tensor]`): Whether each head's input, and the LM's last hidden state, is finite, `()` each.
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
        mask = text_mask(batch, exclude_tokens)  # (batch, ctx_len)
        self.bank, self.k, self.device = bank, k, mask.device
        self.variances, self.dead_masks = variances or {}, dead_masks or {}
        self.rows = None if mask.all() else mask.flatten().nonzero().squeeze(-1)  # (tokens,)
        # Nobody reads the output at padding, but at an excluded token it must be the LM's own.
        self.keeps_some = bool((batch["attention_mask"].bool() & ~mask).any())
        self.autocast = _autocast_of(batch)
        self.local_losses: list[Tensor] = []
        self.measured: dict[str, dict[str, Tensor]] = {}
        self.finite: list[Tensor] = []

    def replacements(self) -> Iterator[Replacement]:
        """Yields, for each head, the replacement of its hookpoint's output."""
        # A replaced module runs only if its own output is needed somewhere.
        needs_output = self.keeps_some or bool(self.variances)
        for name, plan in self.bank.plans.items():
            (reads,) = plan.reads
            yield Replacement(name, plan.hookpoint, reads, partial(self._reconstruct, name), needs_output)

    def without_tokens(self) -> Tensor:
        """
        Zero, `()`, computed from every parameter. A process without data still has to take part when the processes
        exchange gradients, or pieces of heads.
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
        read = self._tokens(activations).to(head.b_dec.device)  # (tokens, d_in)
        self.finite.append(surely_finite(read.detach()).all().to(self.device))
        with self.autocast():
            if not self.variances:
                output = own = head(read, k=self.k[name], return_loss=False)
            else:
                assert original is not None, "with local losses each replaced module runs"
                # `detach`, because a head's local loss must not train the heads before it, whose output it reads.
                own = head(
                    read.detach(),
                    self._tokens(original).to(read.device).detach(),  # (tokens, d_out)
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
        """The activations of the tokens that count, `(tokens, width)`."""
        flat = activations.reshape(-1, activations.shape[-1])
        return flat if self.rows is None else flat[self.rows.to(flat.device)]

    def _placed(self, reconstruction: Tensor, activations: Tensor, original: Tensor | None) -> Tensor:
        """The module's output, `(batch, ctx_len, d_out)`, with the reconstruction at the tokens that count."""
        shape = (*activations.shape[:-1], reconstruction.shape[-1])
        if self.rows is None:
            return reconstruction.to(activations.device).view(shape)
        # Zeros if the module did not run: then the LM reads no other token.
        around = activations.new_zeros(shape) if original is None else original
        reconstruction = reconstruction.to(around.device, around.dtype)
        return around.reshape(-1, shape[-1]).index_copy(0, self.rows.to(around.device), reconstruction).view(shape)


def _full_precision(batch: dict[str, Tensor]) -> torch.autocast:
    """Turns autocast off for the LM, which runs in its own precision; the bank's autocast is for the heads."""
    return torch.autocast(batch["input_ids"].device.type, enabled=False)


def _autocast_of(batch: dict[str, Tensor]) -> Callable[[], AbstractContextManager[object]]:
    """Returns a function that makes the present autocast again, for code inside a block that turned it off."""
    kind = batch["input_ids"].device.type
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))

"""
End-to-end losses that never hold all logits at once.

Training through the LM needs the logits of every token. With a vocabulary of 128,000, the logits of one batch can take
more memory than the LM. So the losses start from the hidden states before the LM's head, and make logits for a few
tokens at a time. The gradient of each piece is taken at once, and its logits are dropped before the next piece.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..common.errors import InputError
from .hooks import base_of


# The most logits in one piece: 64 MiB in float32, whatever the batch and the vocabulary.
MAX_LOGITS = 2**24
# The label of a token that has no next token.
IGNORED = -100


class LogitLoss:
    """
    Computes the cross-entropy of next tokens, and the KL divergence from clean logits, from the hidden states before
    an LM's own head.

    Logits are made for a few tokens at a time and dropped once their loss and its gradient are known.

    Args:
        model (`PreTrainedModel`): A causal LM with its head.

    Raises:
        `InputError`: if the LM has no head.
    """

    def __init__(self, model: PreTrainedModel):
        name = type(model).__name__
        # A masked LM has a head, but sees the token that it would have to predict.
        if model.get_output_embeddings() is None or base_of(model) is model or name.endswith("ForMaskedLM"):
            raise InputError(
                f"training.loss: ce and kl need an LM with a head that predicts the next token, and {name} has none. "
                "Load one with AutoModelForCausalLM, or set --training.loss fvu."
            )
        self.model = model
        self.output_class: type[ModelOutput] = ModelOutput

    def hidden_states(self, **inputs: Any) -> Tensor:
        """Runs the LM up to its head, and returns the head's input, `(batch, ctx_len, d_model)`."""
        output = base_of(self.model)(**inputs)
        self.output_class = type(output)
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """
        Runs the LM's head on hidden states, with the scale or cap that some LMs put on their logits.

        Args:
            hidden (`torch.Tensor` of shape `(num_tokens, d_model)`): From `hidden_states`.

        Returns:
            `torch.Tensor` of shape `(num_tokens, vocab_size)`, in float32 or wider.
        """
        base_model = base_of(self.model)
        own = vars(base_model).get("forward")
        # The LM's own forward pass runs as if its base model had just returned these hidden states.
        base_model.forward = lambda *args, **kwargs: self.output_class(last_hidden_state=hidden[None])
        try:
            placeholder = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)  # (1, num_tokens)
            logits = self.model(input_ids=placeholder).logits[0]  # (num_tokens, vocab_size)
        finally:
            if own is None:
                del base_model.forward
            else:
                base_model.forward = own
        return logits if logits.dtype.itemsize >= 4 else logits.float()

    def __call__(self, hidden: Tensor, labels: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        """
        Returns losses in nats, summed over tokens. Only the loss to train on has a gradient: `kl` if `clean` is given,
        else `ce`.

        Args:
            hidden (`torch.Tensor` of shape `(num_tokens, d_model)`): Hidden states of the spliced LM.
            labels (`torch.LongTensor` of shape `(num_tokens,)`): Next tokens; `IGNORED` where there is none.
            clean (`torch.Tensor` of shape `(num_tokens, d_model)`, *optional*): Hidden states of the clean LM.

        Returns:
            `dict[str, torch.Tensor]`: `ce`; and with `clean`, `kl`, the divergence of the clean distribution from the
            spliced one, `sum p_clean (log p_clean - log p)`, and `ce_clean`.
        """

        def losses(piece: Tensor, rows: slice) -> tuple[Tensor, ...]:
            log_probs = F.log_softmax(self.logits(piece), -1)  # (size, vocab_size)
            ce = F.nll_loss(log_probs, labels[rows], ignore_index=IGNORED, reduction="sum")
            if clean is None:
                return (ce,)
            with torch.no_grad():
                clean_log_probs = F.log_softmax(self.logits(clean[rows]), -1)  # (size, vocab_size)
                ce_clean = F.nll_loss(clean_log_probs, labels[rows], ignore_index=IGNORED, reduction="sum")
            kl = F.kl_div(log_probs, clean_log_probs, log_target=True, reduction="sum")
            return kl, ce, ce_clean

        size = max(1, MAX_LOGITS // self.model.get_output_embeddings().weight.shape[0])
        names = ("ce",) if clean is None else ("kl", "ce", "ce_clean")
        return dict(zip(names, _InPieces.apply(hidden, losses, size, len(names)), strict=True))


class _InPieces(torch.autograd.Function):
    """Sums losses over pieces of tokens. The forward pass already takes the first loss's gradient, piece by piece."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Callable, size: int, count: int) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wanted else None  # (num_tokens, d_model)
        # (count,)
        totals = torch.zeros(count, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                piece = hidden[rows].detach().requires_grad_(wanted)  # (size, d_model)
                values = losses(piece, rows)
                if grad is not None:
                    grad[rows] = torch.autograd.grad(values[0], piece)[0]
            totals += torch.stack([value.detach() for value in values])
        ctx.grad = grad
        return totals.unbind()

    @staticmethod
    def backward(ctx: Any, grad_first: Tensor, *others: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.grad * grad_first.to(ctx.grad.dtype), None, None, None

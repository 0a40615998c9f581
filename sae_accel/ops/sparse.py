from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


# Bounds the pre-activations, the largest tensor of a step, to 256 MiB in float32 whatever the batch.
MAX_PRE_ACTIVATIONS = 2**26


class Selection:
    """
    Which latents each token uses, with the order by latent that both weight gradients need.

    Args:
        indices (`torch.LongTensor` of shape `(num_tokens, k)`): Latents of each token.
        num_latents (`int`): Latents of the head.
        used (`torch.BoolTensor` of shape `(num_tokens, k)`, *optional*): Which entries count; all if not given. Where
            one token uses thousands and most use a few, all work is that of the entries that count.
    """

    def __init__(self, indices: Tensor, num_latents: int, used: Tensor | None = None):
        self.indices = indices
        self.num_latents = num_latents
        self.used = used

    @cached_property
    def latents(self) -> Tensor:
        """The latent of each use, token by token: `(num_uses,)`."""
        return self.flat(self.indices)

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each use: `(num_uses,)`."""
        if self.used is not None:
            return self._places // self._width
        return torch.arange(len(self.indices), device=self.indices.device).repeat_interleave(self._width)

    @cached_property
    def starts(self) -> Tensor:
        """Where the run of each token begins in `latents`: `(num_tokens,)`."""
        if self.used is None:
            return torch.arange(0, self.indices.numel(), self._width, device=self.indices.device)
        numbers = self.used.sum(1)
        return numbers.cumsum(0) - numbers

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """
        The uses sorted by latent, stably so that sums have one order.

        Returns:
            `tuple[Tensor, Tensor]`: positions in `latents`, `(num_uses,)`, and for each latent where its run starts,
            `(num_latents,)`.
        """
        latents, order = self.latents.sort(stable=True)
        every_latent = torch.arange(self.num_latents, device=latents.device)
        return order, torch.searchsorted(latents, every_latent)

    def columns(self, start: int, stop: int | None) -> "Selection":
        """The selection of these columns of `indices`; itself if that is all of them, so that the order is shared."""
        columns = self.indices[:, start:stop]
        if columns.shape == self.indices.shape:
            return self
        used = None if self.used is None else self.used[:, start:stop]
        return Selection(columns.contiguous(), self.num_latents, used)

    def flat(self, values: Tensor) -> Tensor:
        """Of values `(num_tokens, k)`, those of the uses: `(num_uses,)`."""
        return values.flatten() if self.used is None else values.flatten().index_select(0, self._places)

    def by_token(self, values: Tensor) -> Tensor:
        """The values of the uses, `(num_uses,)`, where they belong in `(num_tokens, k)`, and zeros elsewhere."""
        if self.used is None:
            return values.view_as(self.indices)
        return values.new_zeros(self.indices.numel()).index_copy_(0, self._places, values).view_as(self.indices)

    def sum_by_token(self, weights: Tensor, table: Tensor) -> Tensor:
        """
        For each token, the weighted sum of the rows of the latents that it uses.

        Args:
            weights (`torch.Tensor` of shape `(num_tokens, k)`): Weight of each use.
            table (`torch.Tensor` of shape `(num_latents, d)`): One row a latent.

        Returns:
            `torch.Tensor` of shape `(num_tokens, d)`. The `(num_tokens, k, d)` products are never stored.
        """
        return F.embedding_bag(self.latents, table, self.starts, mode="sum", per_sample_weights=self.flat(weights))

    def sum_by_latent(self, weights: Tensor, rows: Tensor) -> Tensor:
        """
        For each latent, the weighted sum of the rows of the tokens that use it.

        Args:
            weights (`torch.Tensor` of shape `(num_tokens, k)`): Weight of each use.
            rows (`torch.Tensor` of shape `(num_tokens, d)`): One row a token.

        Returns:
            `torch.Tensor` of shape `(num_latents, d)`.
        """
        order, starts = self.by_latent
        weights = self.flat(weights)[order]
        return F.embedding_bag(self.tokens[order], rows, starts, mode="sum", per_sample_weights=weights)

    def dot(self, rows: Tensor, table: Tensor) -> Tensor:
        """Products of each token's row with the rows of the latents that it uses: `(num_tokens, k)`."""
        # The kernel behind embedding_bag's own gradient: it never gathers the (tokens, k, d) rows that bmm would need.
        # Private to torch; the gradients in tests/ops/test_sparse.py fail without it.
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows, table, self.latents, self.starts, self.tokens, mode=0
        )
        return self.by_token(products)

    def scatter(self, values: Tensor) -> Tensor:
        """Sums `values` `(num_tokens, k)` by latent: `(num_latents,)`."""
        return values.new_zeros(self.num_latents).scatter_add_(0, self.latents, self.flat(values))

    @property
    def _width(self) -> int:
        return self.indices.shape[1]

    @cached_property
    def _places(self) -> Tensor:
        """Positions of the uses in the flattened `indices`."""
        assert self.used is not None, "all entries count"
        return self.used.flatten().nonzero().squeeze(1)


def sparse_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    select: Callable[[Tensor], tuple[Tensor, Tensor]],
    settle: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    is_ragged: bool = False,
) -> tuple[Tensor, Selection]:
    """
    Pre-activations `weight (x - shift) + bias` of the latents that `select` picks for each token.

    The dense pre-activations live in pieces of at most `MAX_PRE_ACTIVATIONS` elements and are not kept for the
    backward pass, whose cost and memory are those of the selected latents alone. Under autocast the product is taken
    in its precision.

    Args:
        x (`torch.Tensor` of shape `(num_tokens, d_in)`): What the head reads.
        weight (`torch.Tensor` of shape `(num_latents, d_in)`): Encoder.
        bias (`torch.Tensor` of shape `(num_latents,)`): Its bias.
        shift (`torch.Tensor` of shape `(d_in,)`, *optional*): Taken from `x` first, an SAE's `b_dec`.
        select (`Callable`): From dense pre-activations `(num_tokens, num_latents)`, which it may overwrite, to the
            values and indices of some, each `(num_tokens, n)`. It is given the tokens in pieces, and n may differ in
            these.
        settle (`Callable`, *optional*): From values and indices of all tokens to those that stay.
        is_ragged (`bool`, defaults to `False`): Whether tokens select different numbers of latents, so that values of
            -inf fill up the rest and are not to be worked on.

    Returns:
        `tuple[Tensor, Selection]`: the values, `(num_tokens, n)` in the weight's dtype, and the selection.
    """
    shifted = x if shift is None else x - shift.detach()
    with torch.no_grad():
        values, indices = _select_in_pieces(shifted, weight, bias, select)
        if settle is not None:
            values, indices = (kept.contiguous() for kept in settle(values, indices))
    selection = Selection(indices, weight.shape[0], values > -torch.inf if is_ragged else None)
    return _SelectedLinear.apply(shifted, weight, bias, shift, values.to(weight.dtype), selection), selection


def sparse_decode(acts: Tensor, selection: Selection, weight: Tensor) -> Tensor:
    """
    Sum of the decoder rows of the selected latents, `sum_i acts_i weight[i]`.

    Args:
        acts (`torch.Tensor` of shape `(num_tokens, k)`): Activations of the selected latents.
        selection (`Selection`): Which latents they are.
        weight (`torch.Tensor` of shape `(num_latents, d_out)`): Decoder.

    Returns:
        `torch.Tensor` of shape `(num_tokens, d_out)`.
    """
    return _SparseDecode.apply(acts.to(weight.dtype), weight, selection)


def _select_in_pieces(
    x: Tensor, weight: Tensor, bias: Tensor, select: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    rows = max(1, MAX_PRE_ACTIVATIONS // weight.shape[0])
    buffer = None
    pieces = []
    for piece in x.split(rows):
        # One buffer for all pieces: on a CPU, touching fresh pages costs as much as a sixth of the product.
        if buffer is None:
            buffer = piece.new_empty(piece.shape[0], weight.shape[0])
        pieces.append(select(torch.addmm(bias, piece, weight.t(), out=buffer[: piece.shape[0]])))
    if len(pieces) == 1:
        return pieces[0]
    width = max(values.shape[1] for values, _ in pieces)
    wide = [_widened(values, indices, width) for values, indices in pieces]
    return torch.cat([values for values, _ in wide]), torch.cat([indices for _, indices in wide])


def _widened(values: Tensor, indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    missing = width - values.shape[1]
    return F.pad(values, (0, missing), value=-torch.inf), F.pad(indices, (0, missing))


class _SelectedLinear(torch.autograd.Function):
    """A linear map. Only its selected outputs are used, and they are already computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        values: Tensor,
        selection: Selection,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.selection = selection
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        selection = ctx.selection
        needs_x, needs_weight, needs_bias, needs_shift = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = grad_shift = None
        if needs_x:
            grad_x = selection.sum_by_token(grad_values, weight).to(x.dtype)
        if needs_weight:
            grad_weight = selection.sum_by_latent(grad_values, x.to(weight.dtype))
        if needs_bias or needs_shift:
            grad_bias = selection.scatter(grad_values)
        if needs_shift:
            # The sum over tokens comes first, so one product with a vector replaces one with every token.
            grad_shift = -(grad_bias @ weight)
        return grad_x, grad_weight, grad_bias, grad_shift, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, weight: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(acts, weight)
        ctx.selection = selection
        return selection.sum_by_token(acts, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        acts, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_acts = ctx.selection.dot(grad_output, weight) if ctx.needs_input_grad[0] else None
        grad_weight = ctx.selection.sum_by_latent(acts, grad_output) if ctx.needs_input_grad[1] else None
        return grad_acts, grad_weight, None

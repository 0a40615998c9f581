"""
The two matrix products of a head, for latents of which only a few per token are active.

A dense decoder would multiply `(num_tokens, num_latents)` by `(num_latents, d_out)`, although nearly all of the first
matrix is zero. Here each token names its few latents, and the decoder adds up their rows. The same lists of (token,
latent) pairs give both weight gradients: the gradient of a latent's row is a sum over the tokens that use the latent,
so the pairs are sorted by latent once. The encoder still has to compute every pre-activation to find the largest. It
does so in pieces and keeps only the selected ones.

An example with 3 tokens, 4 latents and k = 2:

    indices = [[2, 0],     token 0 uses latents 2 and 0
               [2, 3],     token 1 uses latents 2 and 3
               [0, 2]]     token 2 uses latents 0 and 2
    acts    = [[5., 1.],
               [2., 4.],
               [3., 1.]]

A pair is one token and one latent that it uses. `Selection(indices, num_latents=4)` lists the pairs twice:

    pair                   0  1  2  3  4  5
    latents, by token      2  0  2  3  0  2
    tokens                 0  0  1  1  2  2
    starts                 0  2  4          the pairs of token 1 begin at 2

    order, by latent       1  4  0  2  5  3     (`by_latent`)
    latents[order]         0  0  2  2  2  3
    tokens[order]          0  2  0  1  2  1
    starts by latent       0  2  2  5       latent 1 has no pair: its run is empty

With `W_dec = [[1, 0], [9, 9], [0, 1], [2, 2]]`, `sparse_decode` adds up rows:

    token 0:  5 * [0, 1] + 1 * [1, 0] = [1, 5]
    token 1:  2 * [0, 1] + 4 * [2, 2] = [8, 10]
    token 2:  3 * [1, 0] + 1 * [0, 1] = [3, 1]

If `grad`, `(3, 2)`, is the gradient of this result, then the gradient of row 2 of `W_dec` is
`5 * grad[0] + 2 * grad[1] + 1 * grad[2]`: the run of latent 2 in `order`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


# Limits the pre-activations, the largest tensor of a training step, to 256 MiB in float32 for any batch size.
MAX_PRE_ACTIVATIONS = 2**26


class Selection:
    """
    The latents that each token uses, in token order and in latent order. Both weight gradients need the latent order.

    A pair is one token and one latent that it uses. The module's docstring has an example with numbers.

    Args:
        indices (`torch.LongTensor` of shape `(num_tokens, k)`): Latents of each token.
        num_latents (`int`): Latents of the head.
        used (`torch.BoolTensor` of shape `(num_tokens, k)`, *optional*): Which elements of `indices` count as pairs;
            all if not given. With it, the work grows with the number of pairs, even if one token uses thousands of
            latents and most tokens use a few.
    """

    def __init__(self, indices: Tensor, num_latents: int, used: Tensor | None = None):
        self.indices = indices
        self.num_latents = num_latents
        self.used = used

    @cached_property
    def latents(self) -> Tensor:
        """The latent of each pair, token by token: `(num_pairs,)`."""
        return self.flat(self.indices)

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each pair: `(num_pairs,)`."""
        if self.used is not None:
            return self._places // self._width
        return torch.arange(len(self.indices), device=self.indices.device).repeat_interleave(self._width)

    @cached_property
    def starts(self) -> Tensor:
        """The position in `latents` at which each token's run begins: `(num_tokens,)`."""
        if self.used is None:
            return torch.arange(0, self.indices.numel(), self._width, device=self.indices.device)
        numbers = self.used.sum(1)
        return numbers.cumsum(0) - numbers

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """
        The pairs sorted by latent. The sort is stable, so that sums always add in the same order.

        Returns:
            `tuple[Tensor, Tensor]`: positions in `latents`, `(num_pairs,)`; and the position in this order at which
            each latent's run begins, `(num_latents,)`.
        """
        latents, order = self.latents.sort(stable=True)  # (num_pairs,) each
        every_latent = torch.arange(self.num_latents, device=latents.device)  # (num_latents,)
        return order, torch.searchsorted(latents, every_latent)

    def columns(self, start: int, stop: int | None) -> "Selection":
        """
        The selection of some columns of `indices`. It is this selection itself if these are all columns, so that the
        latent order is computed once.
        """
        columns = self.indices[:, start:stop]
        if columns.shape == self.indices.shape:
            return self
        used = None if self.used is None else self.used[:, start:stop]
        return Selection(columns.contiguous(), self.num_latents, used)

    def flat(self, values: Tensor) -> Tensor:
        """The values of the pairs, `(num_pairs,)`, out of `values`, `(num_tokens, k)`."""
        return values.flatten() if self.used is None else values.flatten().index_select(0, self._places)

    def by_token(self, values: Tensor) -> Tensor:
        """
        The values of the pairs at their positions in `(num_tokens, k)`, with zeros elsewhere.

        Args:
            values (`torch.Tensor` of shape `(num_pairs,)`): One value per pair.
        """
        if self.used is None:
            return values.view_as(self.indices)
        return values.new_zeros(self.indices.numel()).index_copy_(0, self._places, values).view_as(self.indices)

    def sum_by_token(self, weights: Tensor, table: Tensor) -> Tensor:
        """
        For each token, the weighted sum of the rows of the latents that it uses.

        Args:
            weights (`torch.Tensor` of shape `(num_tokens, k)`): Weight of each pair.
            table (`torch.Tensor` of shape `(num_latents, d)`): One row per latent.

        Returns:
            `torch.Tensor` of shape `(num_tokens, d)`. The `(num_tokens, k, d)` products are never stored.
        """
        return F.embedding_bag(self.latents, table, self.starts, mode="sum", per_sample_weights=self.flat(weights))

    def sum_by_latent(self, weights: Tensor, rows: Tensor) -> Tensor:
        """
        For each latent, the weighted sum of the rows of the tokens that use it.

        Args:
            weights (`torch.Tensor` of shape `(num_tokens, k)`): Weight of each pair.
            rows (`torch.Tensor` of shape `(num_tokens, d)`): One row per token.

        Returns:
            `torch.Tensor` of shape `(num_latents, d)`.
        """
        order, starts = self.by_latent
        weights = self.flat(weights)[order]  # (num_pairs,)
        return F.embedding_bag(self.tokens[order], rows, starts, mode="sum", per_sample_weights=weights)

    def dot(self, rows: Tensor, table: Tensor) -> Tensor:
        """
        The dot products of each token's row with the rows of the latents that it uses.

        Args:
            rows (`torch.Tensor` of shape `(num_tokens, d)`): One row per token.
            table (`torch.Tensor` of shape `(num_latents, d)`): One row per latent.

        Returns:
            `torch.Tensor` of shape `(num_tokens, k)`.
        """
        # The kernel behind the gradient of embedding_bag: bmm would have to gather rows of shape (num_tokens, k, d).
        # It is private to torch; the gradient tests in tests/ops/test_sparse.py notice if it changes.
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows, table, self.latents, self.starts, self.tokens, mode=0
        )  # (num_pairs,)
        return self.by_token(products)

    def scatter(self, values: Tensor) -> Tensor:
        """The sum of `values`, `(num_tokens, k)`, by latent: `(num_latents,)`."""
        return values.new_zeros(self.num_latents).scatter_add_(0, self.latents, self.flat(values))

    @property
    def _width(self) -> int:
        return self.indices.shape[1]

    @cached_property
    def _places(self) -> Tensor:
        """Positions of the pairs in the flattened `indices`: `(num_pairs,)`."""
        assert self.used is not None, "without a mask every element of indices is a pair"
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

    The dense pre-activations are computed in pieces of at most `MAX_PRE_ACTIVATIONS` elements, and none is kept for
    the backward pass. The cost and the memory of the backward pass are those of the selected latents alone. Under
    autocast, the dense product uses autocast's precision.

    Args:
        x (`torch.Tensor` of shape `(num_tokens, d_in)`): The head's input.
        weight (`torch.Tensor` of shape `(num_latents, d_in)`): The encoder.
        bias (`torch.Tensor` of shape `(num_latents,)`): The encoder's bias.
        shift (`torch.Tensor` of shape `(d_in,)`, *optional*): A vector that is subtracted from `x` first: the `b_dec`
            of an SAE.
        select (`Callable`): Takes dense pre-activations `(piece, num_latents)`, which it may overwrite, and returns
            values and indices, each `(piece, n)`. It is called once per piece of tokens, and n may differ by piece.
        settle (`Callable`, *optional*): Takes the values and indices of all tokens, and returns the ones to keep.
        is_ragged (`bool`, defaults to `False`): Whether tokens select different numbers of latents. Values of `-inf`
            then fill the shorter rows, and no work is done on them.

    Returns:
        `tuple[Tensor, Selection]`: the values, `(num_tokens, n)` in the weight's dtype, and the selection.
    """
    shifted = x if shift is None else x - shift.detach()  # (num_tokens, d_in)
    with torch.no_grad():
        values, indices = _select_in_pieces(shifted, weight, bias, select)  # (num_tokens, n) each
        if settle is not None:
            values, indices = (kept.contiguous() for kept in settle(values, indices))
    selection = Selection(indices, weight.shape[0], values > -torch.inf if is_ragged else None)
    return _SelectedLinear.apply(shifted, weight, bias, shift, values.to(weight.dtype), selection), selection


def sparse_decode(acts: Tensor, selection: Selection, weight: Tensor) -> Tensor:
    """
    The sum of the decoder rows of each token's latents, `sum_i acts_i weight[i]`.

    Args:
        acts (`torch.Tensor` of shape `(num_tokens, k)`): Activations of the selected latents.
        selection (`Selection`): The indices of these latents.
        weight (`torch.Tensor` of shape `(num_latents, d_out)`): The decoder.

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
        # One buffer serves all pieces: on a CPU, touching fresh memory costs a sixth as much as the product.
        if buffer is None:
            buffer = piece.new_empty(piece.shape[0], weight.shape[0])  # (piece, num_latents)
        pre_activations = torch.addmm(bias, piece, weight.t(), out=buffer[: piece.shape[0]])  # (piece, num_latents)
        pieces.append(select(pre_activations))  # (piece, n) each
    if len(pieces) == 1:
        return pieces[0]
    width = max(values.shape[1] for values, _ in pieces)
    wide = [_widened(values, indices, width) for values, indices in pieces]
    return torch.cat([values for values, _ in wide]), torch.cat([indices for _, indices in wide])


def _widened(values: Tensor, indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
    missing = width - values.shape[1]
    return F.pad(values, (0, missing), value=-torch.inf), F.pad(indices, (0, missing))


class _SelectedLinear(torch.autograd.Function):
    """A linear map that returns selected outputs only. They are computed before, so forward copies them."""

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
        x, weight = ctx.saved_tensors  # (num_tokens, d_in), (num_latents, d_in)
        selection = ctx.selection
        needs_x, needs_weight, needs_bias, needs_shift = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = grad_shift = None
        if needs_x:
            grad_x = selection.sum_by_token(grad_values, weight).to(x.dtype)  # (num_tokens, d_in)
        if needs_weight:
            grad_weight = selection.sum_by_latent(grad_values, x.to(weight.dtype))  # (num_latents, d_in)
        if needs_bias or needs_shift:
            grad_bias = selection.scatter(grad_values)  # (num_latents,)
        if needs_shift:
            # Summing over tokens first leaves one product with a vector instead of one per token.
            grad_shift = -(grad_bias @ weight)  # (d_in,)
        return grad_x, grad_weight, grad_bias, grad_shift, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, weight: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(acts, weight)
        ctx.selection = selection
        return selection.sum_by_token(acts, weight)  # (num_tokens, d_out)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        acts, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()  # (num_tokens, d_out)
        # grad_acts: (num_tokens, k); grad_weight: (num_latents, d_out)
        grad_acts = ctx.selection.dot(grad_output, weight) if ctx.needs_input_grad[0] else None
        grad_weight = ctx.selection.sum_by_latent(acts, grad_output) if ctx.needs_input_grad[1] else None
        return grad_acts, grad_weight, None

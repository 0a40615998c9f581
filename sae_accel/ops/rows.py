"""
Work on the rows of decoder matrices: keep them at norm 1, and keep their gradients at right angles to them.

A decoder has one row per latent, and a row of norm 1 makes a latent's activation comparable with that of others. Two
cases need care. Rows are worked on in slices, because several passes over a slice that stays in the cache are faster
than several passes over the whole matrix. And DeepSpeed gives each process a flat piece of the matrix that may begin
in the middle of a row; a [`Cut`] says where the piece begins, so that processes can add up their parts of a row's sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


# Elements per slice. On a CPU a slice stays in a core's cache; on a GPU it bounds the memory of intermediate results.
SLICE_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}


class Cut(NamedTuple):
    """
    The position of a flat piece inside a matrix. DeepSpeed gives each process one flat piece, without regard to rows.

    Args:
        offset (`int`): Elements of the matrix before the piece.
        rows (`int`): Rows of the matrix.
        width (`int`): Elements per row.
    """

    offset: int
    rows: int
    width: int

    def pieces(self, flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """
        The parts of a flat piece by row, as pairs of a slice of rows and a view of `flat`, `(num_rows, up to width)`.

        Whole rows come together; a row that the piece cuts comes alone. Padding at the end of `flat` is skipped.

        Args:
            flat (`torch.Tensor` of shape `(num_elements,)`): This process's piece of the matrix, or a tensor like it.
        """
        position, stop = self.offset, min(self.offset + flat.numel(), self.rows * self.width)
        while position < stop:
            row, column = divmod(position, self.width)
            count = max(1, (stop - position) // self.width) if column == 0 else 1
            end = min(stop, (row + count) * self.width)
            yield slice(row, row + count), flat[position - self.offset : end - self.offset].view(count, -1)
            position = end

    def row_sums(self, one: Tensor, other: Tensor) -> Tensor:
        """
        The dot product of each row of one matrix with the same row of another, summed over all processes.

        Args:
            one (`torch.Tensor` of shape `(num_elements,)`): This process's piece of one matrix.
            other (`torch.Tensor` of shape `(num_elements,)`): The same piece of another.

        Returns:
            `torch.Tensor` of shape `(rows,)`.
        """
        sums = one.new_zeros(self.rows)  # (rows,)
        for (rows, a), (_, b) in zip(self.pieces(one), self.pieces(other), strict=True):
            sums[rows] = (a * b).sum(-1)  # a, b: (num_rows, up to width)
        dist.all_reduce(sums)
        return sums


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its rows under FSDP, else the whole tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_slices(*tensors: Tensor, cut: Cut | None = None) -> Iterator[tuple[Tensor, ...]]:
    """
    Tensors of one shape, cut alike into slices of whole rows.

    Args:
        tensors (`torch.Tensor` of shape `(num_rows, width)`): Tensors of one shape.
        cut ([`Cut`], *optional*): Given for flat pieces. They come back whole, because their row sums need every
            process.
    """
    first = tensors[0]
    if cut is not None or not first.numel():
        yield tensors
        return
    rows = max(1, SLICE_ELEMENTS.get(first.device.type, 2**26) * len(first) // first.numel())
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


@contextmanager
def few_slices(elements: int) -> Iterator[None]:
    """
    Makes slices at least `elements` long while the context is open.

    Code whose time grows with the number of slices, not with their size, uses this.
    """
    before = dict(SLICE_ELEMENTS)
    SLICE_ELEMENTS.update({device: max(size, elements) for device, size in before.items()})
    try:
        yield
    finally:
        SLICE_ELEMENTS.update(before)


def remove_parallel_(grad: Tensor, rows: Tensor, cut: Cut | None = None) -> None:
    """
    Subtracts from `grad`, in place, its component along each of `rows`. Rows must have a norm near 1.

    Args:
        grad (`torch.Tensor` of shape `(num_latents, d_out)`, or flat with `cut`): The gradient of `rows`.
        rows (`torch.Tensor` of that shape): The decoder.
        cut ([`Cut`], *optional*): The position of both, if they are flat pieces of a matrix.
    """
    if cut is not None:
        along = cut.row_sums(grad, rows)  # (num_latents,)
        for (where, a), (_, b) in zip(cut.pieces(grad), cut.pieces(rows), strict=True):
            a.addcmul_(along[where, None], b, value=-1)
        return
    for a, b in row_slices(grad, rows):
        a.addcmul_((a * b).sum(-1, keepdim=True), b, value=-1)


def normalize_rows_(rows: Tensor, cut: Cut | None = None) -> Tensor:
    """
    Scales each row to norm 1, in place.

    Args:
        rows (`torch.Tensor` of shape `(num_latents, d_out)`, or flat with `cut`): The decoder.
        cut ([`Cut`], *optional*): The position of `rows`, if it is a flat piece of a matrix.
    """
    tiny = torch.finfo(rows.dtype).tiny
    if cut is None:
        return rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(tiny))
    norms = cut.row_sums(rows, rows).sqrt_().clamp_min_(tiny)  # (num_latents,)
    for where, piece in cut.pieces(rows):
        piece.div_(norms[where, None])
    return rows

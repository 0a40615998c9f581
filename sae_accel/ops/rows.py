from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


# Rows are worked on in slices, since each is read and written several times: on a CPU such as stay in a core's cache,
# on a GPU such as bound the memory of what is computed on the way.
SLICE_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}


class Cut(NamedTuple):
    """
    Where a flat piece of a matrix begins. DeepSpeed gives each process one, without regard to rows.

    Args:
        offset (`int`): Elements of the matrix before the piece.
        rows (`int`): Rows of the matrix.
        width (`int`): Elements in a row.
    """

    offset: int
    rows: int
    width: int

    def pieces(self, flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and what of them lies in `flat`, `(rows, up to width)`; padding at the end is left out."""
        position, stop = self.offset, min(self.offset + flat.numel(), self.rows * self.width)
        while position < stop:
            row, column = divmod(position, self.width)
            count = max(1, (stop - position) // self.width) if column == 0 else 1
            end = min(stop, (row + count) * self.width)
            yield slice(row, row + count), flat[position - self.offset : end - self.offset].view(count, -1)
            position = end

    def row_sums(self, one: Tensor, other: Tensor) -> Tensor:
        """Sum of the products along each row, over all processes: `(rows,)`."""
        sums = one.new_zeros(self.rows)
        for (rows, a), (_, b) in zip(self.pieces(one), self.pieces(other), strict=True):
            sums[rows] = (a * b).sum(-1)
        dist.all_reduce(sums)
        return sums


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all, or under FSDP its rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_slices(*tensors: Tensor, cut: Cut | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in slices of whole rows; in one piece if rows are cut, as their parts have to meet."""
    first = tensors[0]
    if cut is not None or not first.numel():
        yield tensors
        return
    rows = max(1, SLICE_ELEMENTS.get(first.device.type, 2**26) * len(first) // first.numel())
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


@contextmanager
def few_slices(elements: int) -> Iterator[None]:
    """While open, slices have at least this many elements, for those whose time goes with the number of slices."""
    before = dict(SLICE_ELEMENTS)
    SLICE_ELEMENTS.update({device: max(size, elements) for device, size in before.items()})
    try:
        yield
    finally:
        SLICE_ELEMENTS.update(before)


def remove_parallel_(grad: Tensor, rows: Tensor, cut: Cut | None = None) -> None:
    """
    Takes from `grad` its part along each of `rows`, in place; rows of norm near 1 are assumed.

    Args:
        grad (`torch.Tensor` of shape `(num_latents, d_out)`, or flat with `cut`): A gradient.
        rows (`torch.Tensor` of that shape): What it is the gradient of.
        cut ([`Cut`], *optional*): Which piece of a matrix both are.
    """
    if cut is not None:
        along = cut.row_sums(grad, rows)
        for (where, a), (_, b) in zip(cut.pieces(grad), cut.pieces(rows), strict=True):
            a.addcmul_(along[where, None], b, value=-1)
        return
    for a, b in row_slices(grad, rows):
        a.addcmul_((a * b).sum(-1, keepdim=True), b, value=-1)


def normalize_rows_(rows: Tensor, cut: Cut | None = None) -> Tensor:
    """Brings each row of `(num_latents, d_out)` to norm 1, in place; `cut` says which piece a flat tensor is."""
    tiny = torch.finfo(rows.dtype).tiny
    if cut is None:
        return rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(tiny))
    norms = cut.row_sums(rows, rows).sqrt_().clamp_min_(tiny)
    for where, piece in cut.pieces(rows):
        piece.div_(norms[where, None])
    return rows

"""Whether numbers are finite, at the cost of one sum where they are."""

from collections.abc import Iterable

import torch
from torch import Tensor


def surely_finite(rows: Tensor) -> Tensor:
    """
    Which rows hold finite numbers alone, by their sums in float32, which takes no memory beside them.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, width)`): Of any floating-point type.

    Returns:
        `torch.BoolTensor` of shape `(num_rows,)`: False also for a row of finite numbers whose sum is beyond float32.
    """
    return rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite()


def finite_rows(rows: Tensor) -> Tensor:
    """As `surely_finite`, but True for every row of finite numbers; it makes a copy of the rows on the way."""
    return rows.abs().amax(-1).isfinite() if rows.shape[-1] else rows.new_ones(len(rows), dtype=torch.bool)


def count_non_finite(tensor: Tensor) -> int:
    """How many numbers of a tensor of any type and shape are NaN or infinite."""
    # What lies on the meta device has no numbers here.
    if tensor.is_meta or not tensor.is_floating_point() or bool(surely_finite(tensor.reshape(1, -1)).all()):
        return 0
    return int((~tensor.isfinite()).sum())


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Of tensors by name, the first with numbers that are not finite, in words that say how many; None if all are."""
    for name, tensor in tensors:
        if count := count_non_finite(tensor.detach()):
            return f"{count:,} of {tensor.numel():,} numbers of {name} are NaN or infinite"
    return None

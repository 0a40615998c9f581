"""
Checks whether numbers are finite.

A sum is NaN or infinite if one of its numbers is. One sum per row is therefore a cheap first check; only rows that
fail it are looked at number by number.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def surely_finite(rows: Tensor) -> Tensor:
    """
    Whether each row is surely finite, judged by its sum in float32. The check allocates no copy of the rows.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, width)`): Rows of any floating-point type.

    Returns:
        `torch.BoolTensor` of shape `(num_rows,)`: False for each row with a NaN or an infinity, and also for a row of
        finite numbers whose sum overflows float32.
    """
    return rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite()


def finite_rows(rows: Tensor) -> Tensor:
    """
    Whether each row holds finite numbers only: exact, unlike `surely_finite`, but it makes a copy of the rows.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, width)`): Rows of any floating-point type.

    Returns:
        `torch.BoolTensor` of shape `(num_rows,)`.
    """
    return rows.abs().amax(-1).isfinite() if rows.shape[-1] else rows.new_ones(len(rows), dtype=torch.bool)


def count_non_finite(tensor: Tensor) -> int:
    """The number of NaN and infinite values in a tensor of any type and shape."""
    # A tensor on the meta device holds no numbers.
    if tensor.is_meta or not tensor.is_floating_point() or bool(surely_finite(tensor.reshape(1, -1)).all()):
        return 0
    return int((~tensor.isfinite()).sum())


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """
    A clause that names the first tensor with a NaN or an infinity and counts them; None if all numbers are finite.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): Names and tensors.
    """
    for name, tensor in tensors:
        if count := count_non_finite(tensor.detach()):
            return f"{count:,} of {tensor.numel():,} numbers of {name} are NaN or infinite"
    return None

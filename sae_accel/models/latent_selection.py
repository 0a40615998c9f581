import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LatentSelection(NamedTuple):
    """
    An activation: how latents are selected, and what their pre-activations become.

    Args:
        select (`Callable`): From pre-activations `(..., num_latents)` and `k` to values and indices, each `(..., k)`.
        activate (`Callable`): From selected pre-activations to activations.
        nests (`bool`): Whether the selection at k is part, in front, of the one at 4k, as Multi-TopK asks.
    """

    select: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    activate: Callable[[Tensor], Tensor]
    nests: bool


def topk(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    The k largest, in descending order. See arXiv:2406.04093, section 2.3. Of fewer latents than k, as a process may
    hold of a head, each is given, and then -inf.
    """
    missing = max(0, k - pre_activations.shape[-1])
    values, indices = pre_activations.topk(k - missing, dim=-1)
    return (
        (F.pad(values, (0, missing), value=-math.inf), F.pad(indices, (0, missing))) if missing else (values, indices)
    )


def groupmax(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of k contiguous groups of equal size."""
    values, indices = pre_activations.unflatten(-1, (k, -1)).max(-1)
    group_size = pre_activations.shape[-1] // k
    return values, indices + group_size * indices.new_ones(k).cumsum(0) - group_size


def signed_topk(pre_activations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest by magnitude, which keep their sign. Found in sparsify's files of June to August 2024."""
    indices = pre_activations.abs().topk(k, dim=-1).indices
    return pre_activations.gather(-1, indices), indices


def _identity(values: Tensor) -> Tensor:
    return values


# ReLU comes after the selection: it is exact, and touches k values for each token instead of num_latents.
SELECTIONS = {
    "topk": LatentSelection(topk, F.relu, nests=True),
    "groupmax": LatentSelection(groupmax, F.relu, nests=False),
    "signed_topk": LatentSelection(signed_topk, _identity, nests=True),
}

"""Count, mean and variance of activations, computed batch by batch and merged exactly over batches and processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.metrics import total_variance


@dataclass
class Moments:
    """
    Number, mean and total variance of activations. They merge exactly over batches and processes.

    Args:
        count (`torch.Tensor` of shape `()`): Number of tokens, in float32 like the rest.
        mean (`torch.Tensor` of shape `(d,)`): Mean over tokens.
        total_variance (`torch.Tensor` of shape `()`): Squared distance from the mean, summed over tokens and
            dimensions.
    """

    count: Tensor
    mean: Tensor
    total_variance: Tensor

    @classmethod
    def of(cls, activations: Tensor) -> "Moments":
        """The moments of activations `(num_tokens, d)`. Zero tokens are allowed."""
        wide = activations.float()
        count = torch.tensor(float(len(wide)), device=wide.device)
        if not len(wide):
            return cls(count, wide.new_zeros(wide.shape[1]), wide.new_zeros(()))
        return cls(count, wide.mean(0), total_variance(wide))

    @classmethod
    def joined(cls, parts: Sequence["Moments"]) -> "Moments":
        """
        The moments of activations that are joined along the last dimension.

        Args:
            parts (`Sequence[Moments]`): The moments of each part, all of the same tokens.
        """
        if len(parts) == 1:
            return parts[0]
        mean = torch.cat([part.mean for part in parts])
        return cls(parts[0].count, mean, torch.stack([part.total_variance for part in parts]).sum())

    def merge(self, other: "Moments") -> "Moments":
        """The moments of two batches together."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        shift = other.mean - self.mean
        between = shift.pow(2).sum() * self.count * share
        return Moments(count, self.mean + share * shift, self.total_variance + other.total_variance + between)

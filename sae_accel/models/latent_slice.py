"""
The slice of a head's latents that one process holds, when a head is too large for one device.

All processes read the same tokens. Each computes the pre-activations of its own latents and selects its own k largest.
`largest` then compares the candidates of all processes and keeps k per token, so that the selection is exactly the
one that a whole head makes. Each process decodes its winners, and `sum` adds up the parts of the reconstruction.
Gradients need the opposite of these: a sum in the forward pass is a copy in the backward pass, and the other way
round.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LatentSlice:
    """
    The latents that this process holds, of a head whose latents lie on several processes. All processes read the same
    tokens.

    Args:
        bounds (`list[int]`): The first latent of each process, and the number of latents at the end.
        index (`int`): The index of this process.
    """

    def __init__(self, bounds: list[int], index: int):
        self.bounds, self.index = bounds, index

    def of(self, rows: Tensor) -> Tensor:
        """
        The rows of this process's latents.

        Args:
            rows (`torch.Tensor` of shape `(num_latents, ...)`): Rows of all latents of the head.
        """
        return rows[self.bounds[self.index] : self.bounds[self.index + 1]]

    def sum(self, part: Tensor) -> Tensor:
        """
        The sum of a tensor over all processes. Its gradient passes through unchanged, since every process has the same
        one.

        Args:
            part (`torch.Tensor`): This process's summand, of the same shape on every process.
        """
        return _Sum.apply(part)

    def shared(self, tensor: Tensor) -> Tensor:
        """
        A tensor that every process holds whole and uses for its own latents. Its gradient is summed over all
        processes.

        Args:
            tensor (`torch.Tensor`): The same tensor on every process.
        """
        return _Shared.apply(tensor)

    def largest(self, values: Tensor) -> Tensor:
        """
        This process's candidates, with `-inf` for each one that is not among the k largest of all processes.

        Args:
            values (`torch.Tensor` of shape `(num_tokens, k)`): The k largest pre-activations per token among the
                latents of this process.

        Returns:
            `torch.Tensor` of shape `(num_tokens, k)`: over all processes together, k values per token stay.
        """
        k = values.shape[1]
        candidates = [torch.empty_like(values) for _ in self.bounds[1:]]  # per process (num_tokens, k)
        dist.all_gather(candidates, values.detach().contiguous())
        # (num_tokens, k): columns of this process's candidates, below 0 or from k on for winners of other processes.
        winners = torch.cat(candidates, dim=1).topk(k, dim=1).indices - self.index * k
        here = (winners >= 0) & (winners < k)  # (num_tokens, k)
        # Winners of other processes go into an extra column, which is dropped at the end.
        won = torch.zeros(len(values), k + 1, dtype=torch.bool, device=values.device)  # (num_tokens, k + 1)
        won.scatter_(1, torch.where(here, winners, k), True)
        return values.masked_fill(~won[:, :k], -torch.inf)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad

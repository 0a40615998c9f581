from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LatentSlice:
    """
    Which latents are here of a head whose latents lie on several processes, all of which read the same tokens.

    Args:
        bounds (`list[int]`): Where the latents of each process begin, and the end of the last.
        index (`int`): Which of the processes this is.
    """

    def __init__(self, bounds: list[int], index: int):
        self.bounds, self.index = bounds, index

    def of(self, rows: Tensor) -> Tensor:
        """Of rows of all latents, those of the latents here."""
        return rows[self.bounds[self.index] : self.bounds[self.index + 1]]

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every process's part, whose gradient each process has already."""
        return _Sum.apply(part)

    def shared(self, tensor: Tensor) -> Tensor:
        """A tensor that every process holds and uses for its own latents: the gradient is the sum of theirs."""
        return _Shared.apply(tensor)

    def largest(self, values: Tensor) -> Tensor:
        """
        This process's candidates, with those at `-inf` that are not among the largest of all.

        Args:
            values (`torch.Tensor` of shape `(num_tokens, k)`): The k largest pre-activations of each token among the
                latents of this process.

        Returns:
            `torch.Tensor` of shape `(num_tokens, k)`: of those of all processes together, k of each token are left.
        """
        k = values.shape[1]
        candidates = [torch.empty_like(values) for _ in self.bounds[1:]]
        dist.all_gather(candidates, values.detach().contiguous())
        winners = torch.cat(candidates, dim=1).topk(k, dim=1).indices - self.index * k
        here = (winners >= 0) & (winners < k)
        # What others won goes into a column that is cut off again.
        won = torch.zeros(len(values), k + 1, dtype=torch.bool, device=values.device)
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

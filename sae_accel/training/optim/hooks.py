"""What happens to gradients and parameters around an optimizer's step, because DeepSpeed shows them nowhere else."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.rows import normalize_rows_, own_part, remove_parallel_


# Learning rates by which thresholds move, as a part of themselves, in a step. At 1, L0 was still a sixth above k after
# 100 steps at 2e-3.
THRESHOLD_PACE = 5


def keep_unit_norm(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """
    Makes an optimizer keep the rows of its `unit_norm` groups at norm 1: before each step the gradient's part along
    each row goes, after it the rows are normalised. See arXiv:2406.04093, appendix A.1.
    """

    @torch.no_grad()
    def project(optimizer, args, kwargs) -> None:
        for group, parameter in _with_gradients(optimizer):
            if group["role"].unit_norm:
                remove_parallel_(own_part(parameter.grad), own_part(parameter), group["role"].cut)

    @torch.no_grad()
    def normalize(optimizer, args, kwargs) -> None:
        for group, parameter in _with_gradients(optimizer):
            if group["role"].unit_norm:
                normalize_rows_(own_part(parameter), group["role"].cut)

    optimizer.register_step_pre_hook(project)
    optimizer.register_step_post_hook(normalize)
    return optimizer


def move_in_proportion(optimizer: torch.optim.Optimizer) -> None:
    """
    Takes an update of a `relative` group for one of the logarithm: a threshold has the scale of what a head reads,
    which no learning rate knows.
    """
    before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def remember(optimizer, args, kwargs) -> None:
        relative = (parameter for group, parameter in _with_gradients(optimizer) if group["role"].relative)
        before[:] = [(own_part(parameter), own_part(parameter).clone()) for parameter in relative]

    @torch.no_grad()
    def multiply(optimizer, args, kwargs) -> None:
        for held, old in before:
            held.copy_(old * (THRESHOLD_PACE * (held - old)).exp())
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(multiply)


def scale_gradients(optimizer: torch.optim.Optimizer, scale: Mapping[str, Tensor]) -> None:
    @torch.no_grad()
    def multiply(optimizer, args, kwargs) -> None:
        for group, parameter in _with_gradients(optimizer):
            if group["role"].head in scale:
                own_part(parameter.grad).mul_(scale[group["role"].head])

    optimizer.register_step_pre_hook(multiply)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Head by head, so that one head's update never depends on another's."""

    @torch.no_grad()
    def clip(optimizer, args, kwargs) -> None:
        squares: dict[str, Tensor] = {}
        for group, parameter in _with_gradients(optimizer):
            square = own_part(parameter.grad).float().pow(2).sum()
            if group["role"].is_part:
                dist.all_reduce(square)
            squares[group["role"].head] = squares.get(group["role"].head, 0.0) + square
        for group, parameter in _with_gradients(optimizer):
            factor = max_norm / (squares[group["role"].head].sqrt() + 1e-6)
            own_part(parameter.grad).mul_(factor.clamp(max=1.0))

    optimizer.register_step_pre_hook(clip)


def _with_gradients(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter

"""
Hooks around an optimizer's step, which change gradients before it and parameters after it.

They are hooks, rather than lines of the training loop, because DeepSpeed shows gradients only inside the step. Each
hook works on the part of a parameter that this process holds, and sums over processes if that is not the whole.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ...bank.parameter_role import ParameterRole
from ...ops.rows import normalize_rows_, own_part, remove_parallel_


# In a step a threshold moves by about 5 learning rates, relative to its size. With 1 instead of 5, L0 was still a
# sixth above k after 100 steps at learning rate 2e-3.
THRESHOLD_PACE = 5


def keep_unit_norm(optimizer: Optimizer) -> Optimizer:
    """
    Makes an optimizer keep the rows of its `unit_norm` groups at norm 1. Before each step the gradient loses its part
    along each row; after the step the rows are normalised. See arXiv:2406.04093, appendix A.1.
    """

    @torch.no_grad()
    def project(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for role, parameter, gradient in _with_gradients(optimizer):
            if role.unit_norm:
                remove_parallel_(gradient, parameter, role.cut)

    @torch.no_grad()
    def normalize(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for role, parameter, _ in _with_gradients(optimizer):
            if role.unit_norm:
                normalize_rows_(parameter, role.cut)

    optimizer.register_step_pre_hook(project)
    optimizer.register_step_post_hook(normalize)
    return optimizer


def move_in_proportion(optimizer: Optimizer) -> None:
    """
    Applies the update of a `relative` group to the logarithm of the parameter: a threshold has the scale of the head's
    input, which no learning rate fits in advance.
    """
    before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def remember(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        relative = (parameter for role, parameter, _ in _with_gradients(optimizer) if role.relative)
        before[:] = [(parameter, parameter.clone()) for parameter in relative]

    @torch.no_grad()
    def multiply(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for held, old in before:
            held.copy_(old * (THRESHOLD_PACE * (held - old)).exp())
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(multiply)


def scale_gradients(optimizer: Optimizer, scale: Mapping[str, Tensor]) -> None:
    """Multiplies the gradients of each head, before each step, by the head's present entry in `scale`."""

    @torch.no_grad()
    def multiply(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for role, _, gradient in _with_gradients(optimizer):
            if role.head in scale:
                gradient.mul_(scale[role.head])

    optimizer.register_step_pre_hook(multiply)


def clip_gradients(optimizer: Optimizer, max_norm: float) -> None:
    """Clips the gradient norm of each head by itself, so that one head's update never depends on another head."""

    @torch.no_grad()
    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        squares: dict[str, Tensor] = {}
        for role, _, gradient in _with_gradients(optimizer):
            square = gradient.float().pow(2).sum()  # ()
            if role.is_part:
                dist.all_reduce(square)
            squares[role.head] = squares[role.head] + square if role.head in squares else square
        for role, _, gradient in _with_gradients(optimizer):
            factor = max_norm / (squares[role.head].sqrt() + 1e-6)
            gradient.mul_(factor.clamp(max=1.0))

    optimizer.register_step_pre_hook(clip)


def _with_gradients(optimizer: Optimizer) -> Iterator[tuple[ParameterRole, Tensor, Tensor]]:
    """Yields this process's part of each parameter that has a gradient, and of the gradient, with the role."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group["role"], own_part(parameter), own_part(parameter.grad)

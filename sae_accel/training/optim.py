import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ..bank.bank import SaeBank
from ..lm.bitsandbytes_backend import require_bitsandbytes
from ..models import BY_LATENT
from ..ops.rows import local, normalize_rows_, remove_parallel_, row_slices
from ..recipe.arguments import LoraArguments, SaeTrainingArguments


# Learning rates by which thresholds move, as a part of themselves, in a step. At 1, L0 was still a sixth above k after
# 100 steps at 2e-3.
THRESHOLD_PACE = 5


def default_learning_rate(optim: str, num_latents: int) -> float:
    """The learning rate of an optimizer for a head of this many latents, where none is given."""
    if optim == "muon":
        return 2e-3
    return (5e-3 if optim == "signum" else 2e-4) / math.sqrt(num_latents / 2**14)


def build_optimizer(
    bank: SaeBank,
    arguments: SaeTrainingArguments,
    lora: LoraArguments | None = None,
    scale: Mapping[str, Tensor] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """
    One optimizer for all heads and a LoRA. Each parameter is a group of its own, which names it and its head: so each
    head has its own learning rate, and state is found by name wherever DeepSpeed puts it.

    What happens to gradients happens within its step, because DeepSpeed shows them nowhere else.

    Args:
        bank (`SaeBank`): The heads.
        arguments (`SaeTrainingArguments`): Which optimizer, and the learning rate of heads that set none.
        lora ([`LoraArguments`], *optional*): Learning rate of a LoRA that the bank holds.
        scale (`Mapping[str, torch.Tensor]`, *optional*): Looked at in each step: by head, what gradients are
            multiplied by first.

    Raises:
        `InputError`: if bitsandbytes cannot be used for `adam8bit`.
    """
    kinds = {"signum": Signum, "muon": MuonWithAdam, "adam8bit": _adam8bit, "adam": torch.optim.Adam}
    optimizer = kinds[arguments.optim](list(_parameter_groups(bank, arguments, lora)))
    _scale_gradients(optimizer, scale)
    if arguments.max_grad_norm is not None:
        _clip_gradients(optimizer, arguments.max_grad_norm)
    if arguments.optim != "signum":
        keep_unit_norm(optimizer)
        _move_in_proportion(optimizer)
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, arguments: SaeTrainingArguments, max_steps: int) -> LRScheduler:
    """The learning rate's schedule over `max_steps` optimizer steps, with the defaults that the arguments state."""
    schedule_free = arguments.optim == "signum"
    warmup = arguments.warmup_steps
    if warmup is None:
        warmup = 0 if schedule_free else min(1000, max_steps // 10)
    elif warmup < 1:
        warmup = round(warmup * max_steps)
    name = arguments.lr_scheduler_type or ("constant" if schedule_free else "linear")
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=int(warmup), num_training_steps=max_steps)


class Signum(torch.optim.Optimizer):
    """
    Schedule-free sign descent: steps by the sign of the gradient at `y`, between the fast iterate `z` and the running
    average `x` of the `z`, `y = momentum * x + (1 - momentum) * z`. See arXiv:2405.15682, and arXiv:1802.04434
    for descent by signs. While it trains, parameters hold `y`; `averaged` gives `x`, which is what to evaluate and
    save.

    In groups with `unit_norm`, rows of `z` and `x` are brought back to norm 1 after each step, in which it deviates
    from the paper. The gradient's part along a row is left in: the sign of what remains without it is no better a
    direction, and cost 0.03 of FVU at the default learning rate after 164k tokens. In groups that are `relative`, `z`
    moves by a part of itself.

    Args:
        params (`Iterable`): Parameters or groups, each with `lr` and optionally `unit_norm`.
        lr (`float`, defaults to 1e-3): Learning rate.
        momentum (`float`, defaults to 0.95): Weight of the average where the gradient is taken.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum, "unit_norm": False, "cut": None, "relative": False})

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients that the parameters hold."""
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
        tensors = (local(tensor) for tensor in (parameter, state["z"], parameter.grad))
        for y, z, grad in row_slices(*tensors, cut=group["cut"]):
            _signum_rows(y, z, grad, group, average)

    @contextmanager
    def averaged(self, optimized: Iterable[tuple[dict, Tensor]] | None = None) -> Iterator[None]:
        """
        While open, parameters hold the average `x`; afterwards they hold, bit for bit, what they held before.

        Args:
            optimized (`Iterable[tuple[dict, torch.Tensor]]`, *optional*): Groups and their parameters; those that are
                in the groups if not given.
        """
        if optimized is None:
            optimized = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        kept = []
        try:
            for group, parameter in optimized:
                if "z" in self.state[parameter]:
                    kept.append((local(parameter), self._average(parameter, group)))
            yield
        finally:
            with torch.no_grad():
                for held, before in kept:
                    held.copy_(before)

    @torch.no_grad()
    def _average(self, parameter: Tensor, group: dict) -> Tensor:
        """Puts the average into a parameter, in place as FSDP asks, and returns what it held."""
        held = local(parameter)
        before = held.clone()
        held.lerp_(local(self.state[parameter]["z"]), 1 - 1 / group["momentum"])
        if group["unit_norm"]:
            normalize_rows_(held, group["cut"])
        return before


def _signum_rows(y: Tensor, z: Tensor, grad: Tensor, group: dict, average: float) -> None:
    """Updates rows of `y` and `z` in place; the average `x` is implied by the two and takes no memory."""
    momentum = group["momentum"]
    x = torch.lerp(y, z, 1 - 1 / momentum)
    if group["relative"]:
        z.mul_(torch.exp(-THRESHOLD_PACE * group["lr"] * grad.sign()))
    else:
        z.add_(grad.sign(), alpha=-group["lr"])
    if group["unit_norm"]:
        normalize_rows_(z, group["cut"])
    x.lerp_(z, average)
    if group["unit_norm"]:
        normalize_rows_(x, group["cut"])
    torch.lerp(x, z, 1 - momentum, out=y)


class MuonWithAdam(torch.optim.Optimizer):
    """
    `torch.optim.Muon` for matrices, with the update scaled to Adam's size (arXiv:2502.16982), and Adam for vectors.

    Args:
        groups (`list[dict]`): Parameter groups, each of matrices alone or of vectors alone.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})
        matrices, vectors = self._split()
        self._parts = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")]
        # A LoRA around frozen heads has no vectors.
        self._parts += [torch.optim.Adam(vectors)] if vectors else []
        self._share()

    def step(self, closure=None):
        """One update from the gradients that the parameters hold."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch; the parts then read the new groups and state."""
        super().load_state_dict(state_dict)
        self._share()

    def _split(self) -> tuple[list[dict], list[dict]]:
        matrices = [group for group in self.param_groups if group["params"][0].ndim == 2]
        return matrices, [group for group in self.param_groups if group["params"][0].ndim != 2]

    def _share(self) -> None:
        for part, groups in zip(self._parts, self._split(), strict=False):
            part.param_groups, part.state = groups, self.state


def keep_unit_norm(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """
    Makes an optimizer keep the rows of its `unit_norm` groups at norm 1: before each step the gradient's part along
    each row goes, after it the rows are normalised. See arXiv:2406.04093, appendix A.1.
    """

    @torch.no_grad()
    def project(optimizer, args, kwargs) -> None:
        for group, parameter in _with_gradients(optimizer):
            if group["unit_norm"]:
                remove_parallel_(local(parameter.grad), local(parameter), group["cut"])

    @torch.no_grad()
    def normalize(optimizer, args, kwargs) -> None:
        for group, parameter in _with_gradients(optimizer):
            if group["unit_norm"]:
                normalize_rows_(local(parameter), group["cut"])

    optimizer.register_step_pre_hook(project)
    optimizer.register_step_post_hook(normalize)
    return optimizer


def _move_in_proportion(optimizer: torch.optim.Optimizer) -> None:
    """
    Takes an update of a `relative` group for one of the logarithm: a threshold has the scale of what a head reads,
    which no learning rate knows.
    """
    before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def remember(optimizer, args, kwargs) -> None:
        relative = (parameter for group, parameter in _with_gradients(optimizer) if group["relative"])
        before[:] = [(local(parameter), local(parameter).clone()) for parameter in relative]

    @torch.no_grad()
    def multiply(optimizer, args, kwargs) -> None:
        for held, old in before:
            held.copy_(old * (THRESHOLD_PACE * (held - old)).exp())
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(multiply)


def _scale_gradients(optimizer: torch.optim.Optimizer, scale: Mapping[str, Tensor]) -> None:
    @torch.no_grad()
    def multiply(optimizer, args, kwargs) -> None:
        for group, parameter in _with_gradients(optimizer):
            if group["head"] in scale:
                local(parameter.grad).mul_(scale[group["head"]])

    optimizer.register_step_pre_hook(multiply)


def _clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Head by head, so that one head's update never depends on another's."""

    @torch.no_grad()
    def clip(optimizer, args, kwargs) -> None:
        squares: dict[str, Tensor] = {}
        for group, parameter in _with_gradients(optimizer):
            square = local(parameter.grad).float().pow(2).sum()
            if group["is_part"]:
                dist.all_reduce(square)
            squares[group["head"]] = squares.get(group["head"], 0.0) + square
        for group, parameter in _with_gradients(optimizer):
            factor = max_norm / (squares[group["head"]].sqrt() + 1e-6)
            local(parameter.grad).mul_(factor.clamp(max=1.0))

    optimizer.register_step_pre_hook(clip)


def _with_gradients(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter


def _parameter_groups(bank: SaeBank, arguments: SaeTrainingArguments, lora: LoraArguments | None) -> Iterator[dict]:
    for name, head in bank.named_heads():
        lr = bank.plans[name].arguments.learning_rate or arguments.learning_rate
        lr = lr or default_learning_rate(arguments.optim, head.config.num_latents)
        for key, parameter in head.named_parameters():
            if parameter.requires_grad:
                rows = (head.config.num_latents,) if key in BY_LATENT else parameter.shape[:1]
                unit_norm = key == "W_dec" and head.config.normalize_decoder
                yield _group(parameter, (*rows, *parameter.shape[1:]), lr, name, key, unit_norm)
    for i, parameter in enumerate(bank.adapter):
        yield _group(parameter, parameter.shape, lora.learning_rate, "lora", str(i))


def _group(parameter: Tensor, whole_shape: tuple, lr: float, head: str, key: str, unit_norm: bool = False) -> dict:
    """`is_part` and `cut` are for a parameter of which this process holds a part only, set where that is arranged."""
    names = {"head": head, "parameter": key, "whole_shape": tuple(whole_shape)}
    flags = {"unit_norm": unit_norm, "relative": key == "threshold", "is_part": False, "cut": None}
    return {"params": [parameter], "lr": lr, **flags, **names}


def _adam8bit(groups: list[dict]) -> torch.optim.Optimizer:
    require_bitsandbytes("training.optim", "adam8bit")
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(groups)

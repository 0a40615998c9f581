import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from .arguments import LoraArguments, SaeTrainingArguments
from .bank import SaeBank
from .bitsandbytes_backend import require_bitsandbytes


# Rows of a weight are updated in slices that stay in a core's cache, since each is read and written several times.
SLICE_ELEMENTS = 2**17


def default_learning_rate(optim: str, num_latents: int) -> float:
    """The learning rate of an optimizer for a head of this many latents, where none is given."""
    if optim == "muon":
        return 2e-3
    return (5e-3 if optim == "signum" else 2e-4) / math.sqrt(num_latents / 2**14)


def build_optimizer(
    bank: SaeBank, arguments: SaeTrainingArguments, lora: LoraArguments | None = None
) -> torch.optim.Optimizer:
    """
    One optimizer for all heads and a LoRA, with parameter groups by head so that each has its own learning rate.

    Args:
        bank (`SaeBank`): The heads.
        arguments (`SaeTrainingArguments`): Which optimizer, and the learning rate of heads that set none.
        lora ([`LoraArguments`], *optional*): Learning rate of a LoRA that the bank holds.

    Raises:
        `InputError`: if bitsandbytes cannot be used for `adam8bit`.
    """
    groups = list(_parameter_groups(bank, arguments))
    if lora is not None:
        groups.append({"params": list(bank.adapter), "lr": lora.learning_rate, "unit_norm": False, "head": "lora"})
    if arguments.optim == "signum":
        return Signum(groups)
    if arguments.optim == "muon":
        return keep_unit_norm(MuonWithAdam(groups))
    if arguments.optim == "adam8bit":
        return keep_unit_norm(_adam8bit(groups))
    return keep_unit_norm(torch.optim.Adam(groups))


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
    direction, and cost 0.03 of FVU at the default learning rate after 164k tokens.

    Args:
        params (`Iterable`): Parameters or groups, each with `lr` and optionally `unit_norm`.
        lr (`float`, defaults to 1e-3): Learning rate.
        momentum (`float`, defaults to 0.95): Weight of the average where the gradient is taken.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "unit_norm": False, "weight_sum": 0.0, "lr_max": 0.0}
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients that the parameters hold."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["lr_max"] = max(group["lr_max"], float(group["lr"]))
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            average = weight / group["weight_sum"] if weight else 0.0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, average)
        return loss

    def _update(self, parameter: Tensor, group: dict, average: float) -> None:
        state = self.state[parameter]
        if "z" not in state:
            state["z"] = parameter.clone(memory_format=torch.preserve_format)
        rows = (
            parameter.shape[0]
            if not parameter.is_cpu
            else max(1, SLICE_ELEMENTS * len(parameter) // parameter.numel())
        )
        for y, z, grad in zip(parameter.split(rows), state["z"].split(rows), parameter.grad.split(rows), strict=True):
            _signum_rows(y, z, grad, group["lr"], group["momentum"], average, group["unit_norm"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While open, parameters hold the average `x`; afterwards they hold, bit for bit, what they held before."""
        kept = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    kept.append((parameter, parameter.data))
                    average = torch.lerp(parameter.data, self.state[parameter]["z"], 1 - 1 / group["momentum"])
                    parameter.data = normalize_rows_(average) if group["unit_norm"] else average
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data


def _signum_rows(
    y: Tensor, z: Tensor, grad: Tensor, lr: float, momentum: float, average: float, unit_norm: bool
) -> None:
    """Updates rows of `y` and `z` in place; the average `x` is implied by the two and takes no memory."""
    x = torch.lerp(y, z, 1 - 1 / momentum)
    z.add_(grad.sign(), alpha=-lr)
    if unit_norm:
        normalize_rows_(z)
    x.lerp_(z, average)
    if unit_norm:
        normalize_rows_(x)
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
        for parameter in _unit_norm_parameters(optimizer):
            if parameter.grad is not None:
                parameter.grad = remove_parallel(parameter.grad, parameter)

    @torch.no_grad()
    def normalize(optimizer, args, kwargs) -> None:
        for parameter in _unit_norm_parameters(optimizer):
            normalize_rows_(parameter)

    optimizer.register_step_pre_hook(project)
    optimizer.register_step_post_hook(normalize)
    return optimizer


def remove_parallel(grad: Tensor, rows: Tensor) -> Tensor:
    """`grad` without its part along each of `rows`, both `(num_latents, d_out)`; rows of norm near 1 are assumed."""
    return torch.addcmul(grad, (grad * rows).sum(-1, keepdim=True), rows, value=-1)


def normalize_rows_(rows: Tensor) -> Tensor:
    """Brings each row of `(num_latents, d_out)` to norm 1, in place."""
    return rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))


def _unit_norm_parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        if group.get("unit_norm"):
            yield from group["params"]


def _parameter_groups(bank: SaeBank, arguments: SaeTrainingArguments) -> Iterator[dict]:
    """For each head its decoder if that is kept at unit norm, its other matrices and its vectors, in a fixed order."""
    for name, head in bank.named_heads():
        if not head.W_dec.requires_grad:
            continue
        lr = bank.plans[name].arguments.learning_rate or arguments.learning_rate
        lr = lr or default_learning_rate(arguments.optim, head.num_latents)
        decoder = [head.W_dec] if head.config.normalize_decoder else []
        others: list[nn.Parameter] = [p for p in head.parameters() if not decoder or p is not head.W_dec]
        for params in (decoder, [p for p in others if p.ndim == 2], [p for p in others if p.ndim != 2]):
            if params:
                yield {"params": params, "lr": lr, "unit_norm": params is decoder, "head": name}


def _adam8bit(groups: list[dict]) -> torch.optim.Optimizer:
    require_bitsandbytes("training.optim", "adam8bit")
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(groups)

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ...bank.bank import SaeBank
from ...bank.parameter_role import ParameterRole
from ...lm.bitsandbytes_backend import require_bitsandbytes
from ...models.pretrained_head import BY_LATENT
from ...recipe.arguments import LoraArguments, SaeTrainingArguments
from .hooks import clip_gradients, keep_unit_norm, move_in_proportion, scale_gradients
from .muon import MuonWithAdam
from .signum import Signum


def default_learning_rate(optim: str, num_latents: int) -> float:
    """The learning rate of an optimizer for a head with `num_latents` latents, if the user sets none."""
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
    Makes one optimizer for all heads and a LoRA. Each parameter is a group of its own, which holds the names of the
    parameter and its head. So each head has its own learning rate, and its state is found by name wherever DeepSpeed
    puts it.

    Gradients are scaled and clipped inside the optimizer's step, because DeepSpeed shows them nowhere else.

    Args:
        bank (`SaeBank`): The heads.
        arguments (`SaeTrainingArguments`): The optimizer, and the learning rate of heads that set none.
        lora ([`LoraArguments`], *optional*): The learning rate of the bank's LoRA, if it has one.
        scale (`Mapping[str, torch.Tensor]`, *optional*): By head, its gradients' factor, `()`; read in each step.

    Raises:
        `InputError`: if bitsandbytes cannot be used for `adam8bit`.
    """
    optimizer = _KINDS[arguments.optim](list(_parameter_groups(bank, arguments, lora)))
    scale_gradients(optimizer, scale)
    if arguments.max_grad_norm is not None:
        clip_gradients(optimizer, arguments.max_grad_norm)
    if arguments.optim != "signum":
        keep_unit_norm(optimizer)
        move_in_proportion(optimizer)
    return optimizer


def build_scheduler(optimizer: torch.optim.Optimizer, arguments: SaeTrainingArguments, max_steps: int) -> LRScheduler:
    """Makes the learning rate's schedule over `max_steps` optimizer steps; the arguments' help states defaults."""
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


def bring_to(scheduler: LRScheduler, step: int) -> None:
    """Sets a schedule to a step; its learning rates follow from the step and the recipe's base rates."""
    if step:
        # `_step_count` is private to torch, which warns if it does not fit; in the tests a warning is an error.
        scheduler.last_epoch, scheduler._step_count = step - 1, step + 1
        scheduler.step()


def _parameter_groups(
    bank: SaeBank, arguments: SaeTrainingArguments, lora: LoraArguments | None
) -> Iterator[dict[str, Any]]:
    for name, head in bank.named_heads():
        lr = bank.plans[name].arguments.learning_rate or arguments.learning_rate
        lr = lr or default_learning_rate(arguments.optim, head.config.num_latents)
        for key, parameter in head.named_parameters():
            if parameter.requires_grad:
                rows = (head.config.num_latents,) if key in BY_LATENT else parameter.shape[:1]
                role = ParameterRole(name, key, (*rows, *parameter.shape[1:]))
                role.unit_norm = key == "W_dec" and head.config.normalize_decoder
                role.relative = key == "threshold"
                yield {"params": [parameter], "lr": lr, "role": role}
    if lora is not None:
        for i, parameter in enumerate(bank.adapter):
            role = ParameterRole("lora", str(i), tuple(parameter.shape))
            yield {"params": [parameter], "lr": lora.learning_rate, "role": role}


def _adam8bit(groups: list[dict]) -> torch.optim.Optimizer:
    require_bitsandbytes("training.optim", "adam8bit")
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(groups)


_KINDS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "signum": Signum,
    "adam": torch.optim.Adam,
    "adam8bit": _adam8bit,
    "muon": MuonWithAdam,
}

"""The disk space of heads and checkpoints, computed from shapes alone."""

from collections.abc import Iterable, Iterator
from math import ceil
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bank.bank import build_head
from ..bank.plans import HeadPlan
from ..lm.hooks import base_of
from ..recipe.arguments import LoraArguments, SaeTrainingArguments
from .lora import lora_targets


# bitsandbytes keeps the state of smaller parameters in 32 bits. For larger ones it keeps a scale per block.
_LEAST_IN_8_BITS, _BLOCK = 4096, 256


def head_bytes(plans: Iterable[HeadPlan]) -> int:
    """The number of bytes of all saved heads."""
    return sum(tensor.nbytes for plan in plans for tensor in _tensors(plan))


def checkpoint_bytes(
    plans: Iterable[HeadPlan],
    training: SaeTrainingArguments,
    adapter: Iterable[torch.Size] = (),
    trains_heads: bool = True,
) -> int:
    """
    The number of bytes of a checkpoint: the heads to evaluate, with signum also the weights that train, the
    optimizer's state and counters.

    Args:
        plans (`Iterable[HeadPlan]`): All heads of the run.
        training (`SaeTrainingArguments`): How the heads train.
        adapter (`Iterable[torch.Size]`, *optional*): The shapes of a LoRA's parameters.
        trains_heads (`bool`, defaults to `True`): Whether the heads train; False if only the LoRA does.
    """
    plans = list(plans)
    copies = 2 if training.optim == "signum" else 1
    total = copies * head_bytes(plans) + sum(8 * plan.config.num_latents for plan in plans)
    if trains_heads:
        total += sum(_state_bytes(tensor.shape, training) for plan in plans for tensor in _tensors(plan))
    # Twice: the adapter that PEFT writes, and the copy in the training state.
    return total + sum(2 * 4 * shape.numel() + _state_bytes(shape, training) for shape in adapter)


def adapter_shapes(
    architecture: PreTrainedModel, plans: list[HeadPlan], lora: LoraArguments | None
) -> Iterator[torch.Size]:
    """Yields the shapes of the parameters of a LoRA; none if `lora` is None."""
    if lora is None:
        return
    base_model = base_of(architecture)
    for name in lora_targets(base_model, plans, lora):
        for width in cast(Tensor, base_model.get_submodule(name).weight).shape:
            yield torch.Size((lora.rank, width))


def _tensors(plan: HeadPlan) -> list[Tensor]:
    with torch.device("meta"):
        head: nn.Module = build_head(plan)
    return list(head.state_dict().values())


def _state_bytes(shape: torch.Size, training: SaeTrainingArguments) -> int:
    """The number of bytes of an optimizer's state for one parameter."""
    count = shape.numel()
    if training.optim == "signum":
        return 4 * count
    if training.optim == "adam8bit" and count >= _LEAST_IN_8_BITS:
        return 2 * (count + 4 * ceil(count / _BLOCK))
    return (4 if training.optim == "muon" and len(shape) == 2 else 8) * count

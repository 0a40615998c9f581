from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..bank.plans import HeadPlan
from ..common.errors import InputError
from ..common.extras import require_extra
from ..lm.adapter import quiet_peft
from ..lm.hooks import base_of
from ..lm.modules import hookpoint_names, layer_list, match_modules
from ..lm.other_names import no_match
from ..recipe.arguments import LoraArguments


if TYPE_CHECKING:
    from peft import PeftModel


def lora_targets(base_model: PreTrainedModel, plans: list[HeadPlan], lora: LoraArguments) -> list[str]:
    """
    Finds the names of an LM's linear layers that get a LoRA.

    Args:
        base_model (`PreTrainedModel`): The LM without its LM head.
        plans (`list[HeadPlan]`): The run's heads.
        lora ([`LoraArguments`]): Names the layers; if it names none, all linear layers behind the first head.

    Raises:
        `InputError`: if a pattern, or the default, matches no linear layer.
    """
    linear = [name for name in hookpoint_names(base_model) if _is_linear(base_model.get_submodule(name))]
    if lora.target_modules:
        targets: dict[str, None] = {}
        for i, pattern in enumerate(lora.target_modules):
            matches = [name for name, _ in match_modules(pattern, linear)]
            if not matches:
                raise InputError(no_match(f"lora.target_modules[{i}]", pattern, "linear layer", base_model, linear))
            targets |= dict.fromkeys(matches)
        return list(targets)
    layers = layer_list(base_model)
    inside = f"{layers}."
    first = min(_layer(plan.hookpoint, inside) for plan in plans)
    behind = [name for name in linear if name.startswith(inside) and _layer(name, inside) > first]
    if not behind:
        raise InputError(
            f"lora.target_modules: {type(base_model).__name__} has no linear layer behind layer {first}, the layer "
            "of the first head. Name the layers to adapt, for instance --lora.target_modules '**.mlp.*'."
        )
    return behind


def add_lora(model: PreTrainedModel, targets: list[str], lora: LoraArguments) -> "PeftModel":
    """
    Adds a new LoRA to a frozen LM, in place. Only its parameters train; at the start it changes no output.

    Args:
        model (`PreTrainedModel`): The LM with its LM head.
        targets (`list[str]`): The result of `lora_targets`.
        lora ([`LoraArguments`]): The LoRA's rank and scale.
    """
    require_extra("lora", "peft")
    from peft import LoraConfig, get_peft_model

    within = f"{model.base_model_prefix}."
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by it, and its scale may be any number.
        target_modules=[within + name for name in targets],
        fan_in_fan_out=all(isinstance(base_of(model).get_submodule(name), Conv1D) for name in targets),
    )
    with quiet_peft():
        return get_peft_model(model, config).eval()


def save_lora(adapted: "PeftModel", folder: Path) -> None:
    """Writes an adapter that `peft` can load, without PEFT's own README, which describes a repo of its own."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _layer(name: str, inside: str) -> int:
    """The number of the layer that a module belongs to; -1 for a module outside the layers."""
    return int(name.removeprefix(inside).split(".")[0]) if name.startswith(inside) else -1

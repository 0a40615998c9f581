import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, PromptLearningConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ..bank.plans import HeadPlan, hookpoint_names, layer_list, match_modules, no_match
from ..common.errors import InputError
from ..loading.repository import Repository
from ..recipe.arguments import LoraArguments, ModelArguments


# Names in an adapter's file begin with this, and go on as in the model that it was trained on.
_PREFIX = "base_model.model."
_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Adapter:
    """
    A PEFT adapter in a folder or repo.

    Args:
        arguments ([`ModelArguments`]): Which adapter, and which LM it is for.

    Raises:
        `InputError`: if it cannot be found, or works by other means than layers.
    """

    def __init__(self, arguments: ModelArguments):
        self.arguments = arguments
        with self._reading():
            self.folder = _fetch(arguments)
            self.config = PeftConfig.from_pretrained(self.folder)
            weights = load_peft_weights(self.folder, device="cpu")
        self.shapes = {name: tuple(value.shape) for name, value in weights.items()}
        if isinstance(self.config, PromptLearningConfig):
            raise InputError(
                f"model.adapter: {arguments.adapter!r} is of type {self.config.peft_type.value}, which changes what "
                "the LM reads and not its modules. Use an adapter such as LoRA."
            )

    def auto_class(self, config: PreTrainedConfig) -> type:
        """The class of an LM with whose names its files were written: with or without the LM's head."""
        prefixes = {name.removeprefix(_PREFIX).split(".")[0] for name in self.shapes}
        for mapping, auto_class in (
            (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
            (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
        ):
            if type(config) in mapping and mapping[type(config)].base_model_prefix in prefixes:
                return auto_class
        return AutoModel

    def check(self, architecture: PreTrainedModel) -> None:
        """
        Puts its layers, without weights, onto an LM without weights.

        Raises:
            `InputError`: if it does not fit the LM.
        """
        with self._reading():
            adapted = get_peft_model(architecture, self.config)
        expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
        for name in sorted(expected.keys() | self.shapes.keys()):
            if expected.get(name) != self.shapes.get(name):
                raise InputError(
                    f"model.adapter: {self.arguments.adapter!r} does not fit {self.arguments.name_or_path!r}: for "
                    f"{name!r} the LM has {expected.get(name, 'nothing')}, the adapter "
                    f"{self.shapes.get(name, 'nothing')}. Use the LM that it was trained on "
                    f"({self.config.base_model_name_or_path})."
                )

    def put_onto(self, model: PreTrainedModel) -> None:
        """
        Puts it onto an LM, in place.

        Raises:
            `InputError`: if it does not fit the LM.
        """
        with self._reading():
            PeftModel.from_pretrained(model, self.folder)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"model.adapter: {self.arguments.adapter!r} cannot be loaded: {reason}") from error


def lora_targets(base_model: PreTrainedModel, plans: list[HeadPlan], lora: LoraArguments) -> list[str]:
    """
    Names of the linear layers of an LM that get a LoRA.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        plans (`list[HeadPlan]`): Heads around which it is trained.
        lora ([`LoraArguments`]): Which layers it asks for.

    Raises:
        `InputError`: if there are none.
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
            f"lora.target_modules: {type(base_model).__name__} has no linear layer behind layer {first}, where the "
            "first head sits. Name the layers to adapt."
        )
    return behind


def add_lora(model: PreTrainedModel, targets: list[str], lora: LoraArguments) -> PeftModel:
    """
    Puts a new LoRA, whose parameters alone are trained, onto a frozen LM, in place. It starts as nothing.

    Args:
        model (`PreTrainedModel`): The LM with its head.
        targets (`list[str]`): Of `lora_targets`.
        lora ([`LoraArguments`]): Its rank and scale.
    """
    within = f"{model.base_model_prefix}."
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[within + name for name in targets],
        fan_in_fan_out=all(isinstance(model.base_model.get_submodule(name), Conv1D) for name in targets),
    )
    with _quiet():
        return get_peft_model(model, config).eval()


def save_lora(adapted: PeftModel, folder: Path) -> None:
    """Writes an adapter as `peft` reads it, without the card that PEFT makes for a repo of its own."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT reads a property that transformers has renamed, and would have each user told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _fetch(arguments: ModelArguments) -> str:
    """Where the adapter's files lie on this machine, after fetching them if need be."""
    repository = Repository(arguments.adapter, token=arguments.token)
    if _FILES[0] not in repository.files:
        raise ValueError(f"it has no {_FILES[0]}. Name a folder or repo that PEFT has written.")
    return str(Path([repository.fetch(file) for file in _FILES if file in repository.files][0]).parent)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _layer(name: str, inside: str) -> int:
    """Number of the layer that a module belongs to; -1 for what comes before the layers."""
    return int(name.removeprefix(inside).split(".")[0]) if name.startswith(inside) else -1

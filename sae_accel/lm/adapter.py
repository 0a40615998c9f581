"""
Puts a PEFT adapter, such as a LoRA, onto the frozen LM.

`Adapter` fetches the adapter's files and compares their shapes with an LM without weights. So a wrong adapter is
refused before the LM's weights are read, which can take minutes. Then it adds the layers to the real LM, in place.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..common.errors import InputError, is_out_of_memory
from ..common.extras import require_extra
from ..loading.head_files import reason_of
from ..loading.repository import Repository
from ..recipe.arguments import ModelArguments


if TYPE_CHECKING:
    from peft import PeftModel


# Every name in an adapter's file begins with this. The rest is the name in the model that the adapter was trained on.
_PREFIX = "base_model.model."
_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


# Classes of transformers that pick an LM's own class by its config.
AutoClass = type[AutoModel] | type[AutoModelForCausalLM] | type[AutoModelForMaskedLM]


class Adapter:
    """
    A PEFT adapter in a folder or repo.

    Args:
        arguments ([`ModelArguments`]): The adapter, and the LM that it is for.

    Raises:
        `InputError`: if the adapter cannot be found, or changes the LM's input and not its layers.
    """

    def __init__(self, arguments: ModelArguments):
        require_extra("model.adapter", "peft")
        from peft import PeftConfig, PromptLearningConfig
        from peft.utils import load_peft_weights

        self.arguments = arguments
        with self._reading():
            self.folder = _fetch(arguments)
            self.config = PeftConfig.from_pretrained(self.folder)
            weights = load_peft_weights(self.folder, device="cpu")
        self.shapes = {name: tuple(value.shape) for name, value in weights.items()}
        if isinstance(self.config, PromptLearningConfig):
            kind = getattr(self.config.peft_type, "value", self.config.peft_type)
            raise InputError(
                f"model.adapter: {arguments.adapter!r} is of type {kind}, which changes the LM's input and not its "
                "modules. Use an adapter such as LoRA."
            )

    def auto_class(self, config: PreTrainedConfig) -> AutoClass:
        """Returns the class, with or without the LM's head, whose module names the adapter's files use."""
        prefixes = {name.removeprefix(_PREFIX).split(".")[0] for name in self.shapes}
        for mapping, auto_class in (
            (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
            (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
        ):
            if type(config) in mapping and getattr(mapping[type(config)], "base_model_prefix", None) in prefixes:
                return auto_class
        return AutoModel

    def check(self, architecture: PreTrainedModel) -> None:
        """
        Adds the adapter's layers, without weights, to an LM without weights.

        Raises:
            `InputError`: if the adapter does not fit the LM.
        """
        from peft import get_peft_model, get_peft_model_state_dict

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
        Adds the adapter to an LM, in place.

        Raises:
            `InputError`: if the adapter does not fit the LM.
        """
        from peft import PeftModel

        with self._reading():
            PeftModel.from_pretrained(model, self.folder)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with quiet_peft():
                yield
        except Exception as error:
            # PEFT raises errors of many types here, and all of them come from the adapter's files.
            if is_out_of_memory(error) or (isinstance(error, InputError) and str(error).startswith("model.")):
                raise
            raise InputError(
                f"model.adapter: {self.arguments.adapter!r} cannot be loaded: {reason_of(error)}"
            ) from error


def unwrapped(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """
    Returns the LM inside PEFT's wrapper. The adapter's layers sit in the LM's modules, so the wrapper adds nothing.

    Raises:
        `InputError`: if the adapter changes the LM's input and not its modules.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError("The LM's adapter changes the LM's input and not its modules. Use an adapter such as LoRA.")
    within: Callable[[], PreTrainedModel] | None = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model) if within is None else within()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides a warning of transformers: PEFT reads a property that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _fetch(arguments: ModelArguments) -> str:
    """Fetches the adapter's files where needed, and returns their folder on this machine."""
    repository = Repository(str(arguments.adapter), token=arguments.token)
    if _FILES[0] not in repository.files:
        raise ValueError(f"it has no {_FILES[0]}. Name a folder or repo that PEFT has written.")
    if not {*_FILES[1:]} & {*repository.files}:
        raise ValueError(f"it has neither {_FILES[1]} nor {_FILES[2]}.")
    return str(Path([repository.fetch(file) for file in _FILES if file in repository.files][0]).parent)

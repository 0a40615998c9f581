"""Trains sparse autoencoders and transcoders on the activations of Hugging Face language models."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any


# Some libraries import bitsandbytes whenever it is installed; on some CPUs it then logs that it could use a kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Accelerate imports DeepSpeed whenever it is installed, and DeepSpeed then logs that there is no GPU. Its other
# messages stay, for runs that use it.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

if TYPE_CHECKING:
    from .activations.running_lm import Activations, RunningLM
    from .common.errors import InputError
    from .data.tokens import chunk_and_tokenize, load_tokens
    from .lm.splice import splice
    from .loading.auto import AutoSae
    from .loading.sae_heads import SaeHeads
    from .models.configuration_sae import SaeConfig
    from .models.configuration_transcoder import TranscoderConfig
    from .models.modeling_sae import SaeModel
    from .models.modeling_transcoder import TranscoderModel
    from .models.outputs import HeadOutput, Latents
    from .recipe.arguments import DataArguments, HeadArguments, LoraArguments, ModelArguments, SaeTrainingArguments
    from .recipe.recipe import Recipe, load_recipe
    from .training.trainer import SaeTrainer


__version__ = "0.1.0"

# The module of each public name. A name is imported at its first use, so that loading a head does not import the
# trainer.
_HOMES = {
    "Activations": "activations.running_lm",
    "AutoSae": "loading.auto",
    "DataArguments": "recipe.arguments",
    "HeadArguments": "recipe.arguments",
    "HeadOutput": "models.outputs",
    "InputError": "common.errors",
    "Latents": "models.outputs",
    "LoraArguments": "recipe.arguments",
    "ModelArguments": "recipe.arguments",
    "Recipe": "recipe.recipe",
    "RunningLM": "activations.running_lm",
    "SaeConfig": "models.configuration_sae",
    "SaeHeads": "loading.sae_heads",
    "SaeModel": "models.modeling_sae",
    "SaeTrainer": "training.trainer",
    "SaeTrainingArguments": "recipe.arguments",
    "TranscoderConfig": "models.configuration_transcoder",
    "TranscoderModel": "models.modeling_transcoder",
    "chunk_and_tokenize": "data.tokens",
    "load_recipe": "recipe.recipe",
    "load_tokens": "data.tokens",
    "splice": "lm.splice",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

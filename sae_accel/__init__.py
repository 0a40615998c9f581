import logging


# transformers imports bitsandbytes wherever it is installed, which on some CPUs says then that a kernel could be had.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .activations.running_lm import Activations, RunningLM
from .common.errors import InputError
from .data.tokens import chunk_and_tokenize, load_tokens
from .lm.splice import splice
from .loading.auto import AutoSae
from .loading.sae_heads import SaeHeads
from .models import (
    HeadOutput,
    Latents,
    SaeConfig,
    SaeModel,
    TranscoderConfig,
    TranscoderModel,
)
from .recipe.arguments import (
    DataArguments,
    HeadArguments,
    LoraArguments,
    ModelArguments,
    SaeTrainingArguments,
)
from .recipe.recipe import Recipe, load_recipe
from .training.trainer import SaeTrainer


__version__ = "0.1.0"

__all__ = [
    "Activations",
    "AutoSae",
    "DataArguments",
    "HeadArguments",
    "HeadOutput",
    "InputError",
    "Latents",
    "LoraArguments",
    "ModelArguments",
    "Recipe",
    "RunningLM",
    "SaeConfig",
    "SaeHeads",
    "SaeModel",
    "SaeTrainer",
    "SaeTrainingArguments",
    "TranscoderConfig",
    "TranscoderModel",
    "chunk_and_tokenize",
    "load_recipe",
    "load_tokens",
    "splice",
]

import logging


# transformers imports bitsandbytes wherever it is installed, which on some CPUs says then that a kernel could be had.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .activations import Activations, RunningLM
from .arguments import DataArguments, HeadArguments, LoraArguments, ModelArguments, SaeTrainingArguments
from .data import chunk_and_tokenize, load_tokens
from .errors import InputError
from .models import (
    AutoSae,
    HeadOutput,
    Latents,
    SaeConfig,
    SaeHeads,
    SaeModel,
    TranscoderConfig,
    TranscoderModel,
)
from .recipe import Recipe, load_recipe
from .splicing import splice
from .trainer import SaeTrainer


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

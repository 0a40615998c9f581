from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .arguments import ModelArguments
from .errors import InputError


def load_architecture(arguments: ModelArguments) -> PreTrainedModel:
    """
    The LM without its head, without weights: on the meta device, so that a recipe is checked before anything large is
    read.

    Args:
        arguments ([`ModelArguments`]): Which LM.

    Raises:
        `InputError`: if there is no such model.
    """
    with reading(arguments):
        config = AutoConfig.from_pretrained(arguments.name_or_path, **_source(arguments))
        with torch.device("meta"):
            return AutoModel.from_config(
                config, trust_remote_code=arguments.trust_remote_code, **_attention(arguments)
            )


def load_lm(arguments: ModelArguments) -> PreTrainedModel:
    """
    The frozen LM without its head, in evaluation mode.

    Args:
        arguments ([`ModelArguments`]): Which LM, and in which precision.

    Raises:
        `InputError`: if there is no such model, or it cannot be read.
    """
    with reading(arguments):
        model = AutoModel.from_pretrained(
            arguments.name_or_path,
            dtype=arguments.dtype,
            **_source(arguments),
            **_attention(arguments),
        )
    return model.requires_grad_(False).eval()


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """
    The LM's tokenizer.

    Raises:
        `InputError`: if there is none.
    """
    with reading(arguments):
        return AutoTokenizer.from_pretrained(arguments.name_or_path, **_source(arguments))


class reading:
    """Gives the reason for a model that cannot be read in one line; keeps reports on unused weights off the screen."""

    def __init__(self, arguments: ModelArguments):
        self.arguments = arguments

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if isinstance(error, (OSError, ValueError, KeyError, ImportError)) and not isinstance(error, InputError):
            reason = " ".join(str(error).split())
            raise InputError(
                f"model.name_or_path: {self.arguments.name_or_path!r} cannot be loaded: {reason}"
            ) from error


def _source(arguments: ModelArguments) -> dict[str, Any]:
    options = {
        "revision": arguments.revision or "main",
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }
    return options | ({"gguf_file": arguments.gguf_file} if arguments.gguf_file else {})


def _attention(arguments: ModelArguments) -> dict[str, str]:
    chosen = arguments.attn_implementation
    return {} if chosen is None else {"attn_implementation": chosen}

"""
Turns the errors of transformers, PEFT and the Hub's client into one line that names the field, the reason and the way
out.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from transformers.utils import logging as transformers_logging

from ..common.errors import InputError, is_out_of_memory
from ..common.hub_answers import answer_behind, clause, is_unreachable, needs_token
from ..common.hub_requests import HubFailed, hub_requests
from ..loading.head_files import reason_of
from ..recipe.arguments import ModelArguments


@contextmanager
def lm_errors(arguments: ModelArguments) -> Iterator[None]:
    """
    While open, an LM that cannot be read is refused in one line. The report on unused weights is not shown.

    Args:
        arguments ([`ModelArguments`]): The LM that is read.

    Raises:
        `InputError`: in place of any error that transformers raises.
    """
    name, verbosity = arguments.name_or_path, transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with (
            nullcontext() if os.path.isdir(name) else hub_requests(f"loading {name!r}"),
            warnings.catch_warnings(),
        ):
            # For a config that makes no sense torch warns too, before the config is refused.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
            yield
    except Exception as error:
        if is_out_of_memory(error) or (isinstance(error, InputError) and not isinstance(error, HubFailed)):
            raise
        raise InputError(f"model.name_or_path: {name!r} {_what_is_wrong(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _what_is_wrong(error: Exception) -> str:
    if (answer := answer_behind(error)) is not None:
        # The message of transformers has many lines, and addresses in place of reasons.
        with_cache = ", and it is not in the cache" if is_unreachable(answer) else ""
        advice = " Try again later." if isinstance(answer, HubFailed) else ""
        advice = " Set --model.token, or run `hf auth login`." if needs_token(answer) else advice
        return f"cannot be loaded: {clause(answer)}{with_cache}.{advice}"
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return (
            "needs code of its own, which runs only with --model.trust_remote_code true. Read that code before you "
            "set it, or use another LM."
        )
    if "backend tokenizer" in str(error):
        return "has no tokenizer: neither tokenizer.json nor files to make one from."
    return f"cannot be loaded: {reason_of(error)}"

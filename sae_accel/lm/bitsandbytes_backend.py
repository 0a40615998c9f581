import logging

import torch
from torch import nn

from ..common.errors import InputError, one_line
from ..common.extras import require_extra


def require_bitsandbytes(field: str, value: str) -> None:
    """
    Checks that bitsandbytes works on this machine, before anything large is read, and keeps its notices on casts to
    half precision, one for each product, off the screen.

    Args:
        field (`str`): Of the recipe, with which an error begins.
        value (`str`): Its value, which needs bitsandbytes.

    Raises:
        `InputError`: if it does not.
    """
    require_extra(f"{field} {value}", "bitsandbytes")
    try:
        import bitsandbytes
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
        from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

        validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, RuntimeError) as error:
        reason = one_line(error)
        raise InputError(
            f"{field}: {value} needs bitsandbytes with a backend for this machine: {reason} Remove "
            f"{field}, or install it."
        ) from error
    # On other devices bitsandbytes works without a library of its own.
    if torch.cuda.is_available() and isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise InputError(
            f"{field}: {value} needs bitsandbytes, whose version {bitsandbytes.__version__} has no library for this "
            f"machine. Remove {field}, or install one that has."
        )
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def keep_unpacked(model: nn.Module) -> None:
    """
    Keeps an LM's 4-bit weights as they are on CPUs with AVX512-BF16, where bitsandbytes would pack them in its first
    forward pass without gradients, for a product that has none and that takes no odd widths.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # torch's types know tensors alone.

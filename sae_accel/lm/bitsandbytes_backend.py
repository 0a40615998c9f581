"""
What this package needs from bitsandbytes, which quantises LMs and runs 8-bit optimizers: a check that it works on this
machine, made before anything is loaded, and a setting that keeps its 4-bit weights usable for training on CPUs.
"""

import logging

import torch
from torch import nn

from ..common.errors import InputError, one_line
from ..common.extras import require_extra


def require_bitsandbytes(field: str, value: str) -> None:
    """
    Checks that bitsandbytes works on this machine, before anything large is read. It also hides the notice about half
    precision that bitsandbytes prints for each matrix product.

    Args:
        field (`str`): The recipe's field, with which an error begins.
        value (`str`): The field's value, which needs bitsandbytes.

    Raises:
        `InputError`: if bitsandbytes does not work.
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
            f"{field}, or install bitsandbytes."
        ) from error
    # On other devices bitsandbytes works without a library of its own.
    if torch.cuda.is_available() and isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise InputError(
            f"{field}: {value} needs bitsandbytes, whose version {bitsandbytes.__version__} has no library for this "
            f"machine. Remove {field}, or install a version that has one."
        )
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def keep_unpacked(model: nn.Module) -> None:
    """
    Keeps an LM's 4-bit weights unpacked on CPUs with AVX512-BF16. There, bitsandbytes packs the weights in the first
    forward pass without gradients, for a matrix product that has no backward pass and accepts no odd widths.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # torch's types allow tensors alone.

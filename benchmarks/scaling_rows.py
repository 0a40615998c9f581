"""
The rows of the table in scaling.py: the ways to spread heads over processes, and the bytes that each way must send.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """
    The sizes that decide how much is sent: `width` and `itemsize` of an activation, `sites` as the number of
    hookpoints.
    """

    processes: int
    tokens: int
    parameters: int
    sites: int
    width: int
    itemsize: int
    k: int


def parameters(times: int) -> Callable[[Sizes], float]:
    """Bytes per token for parameters or gradients in float32: `times` is 1 per gather or scatter, 2 per all-reduce."""
    return lambda sizes: times * (sizes.processes - 1) * 4 * sizes.parameters / sizes.tokens


def activations_to_all(sizes: Sizes) -> float:
    """Bytes per token if every process sends its activations to all others."""
    return sizes.sites * sizes.width * sizes.itemsize * (sizes.processes - 1)


def activations_to_one(sizes: Sizes) -> float:
    """Bytes per token if the activations of a hookpoint go only to the process that holds its head."""
    return activations_to_all(sizes) / sizes.processes


def latents(sizes: Sizes) -> float:
    """
    Bytes per token for activations to all, k candidates of each process to all, and an all-reduce of the
    reconstruction.
    """
    others = sizes.processes - 1
    candidates = sizes.processes * others * 4 * sizes.k
    return activations_to_all(sizes) + sizes.sites * (candidates + 2 * others * 4 * sizes.width)


class Row(NamedTuple):
    """
    A row of the table: how it is started, and the bytes per token that all processes together must send; None for one
    process alone.
    """

    package: str
    way: str
    theory: Callable[[Sizes], float] | None = None
    arguments: dict[str, Any] = {}
    environment: dict[str, str] = {}


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO_2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
# FSDP gathers parameters for the forward and the backward pass and scatters gradients; ZeRO-2 scatters gradients and
# gathers the updated parameters.
ROWS = {
    "ours": Row("sae_accel", "alone"),
    "ours-ddp": Row("sae_accel", "DDP", parameters(2)),
    "ours-fsdp": Row("sae_accel", "FSDP", parameters(3), environment=FSDP),
    "ours-zero2": Row("sae_accel", "ZeRO-2", parameters(2), environment=ZERO_2),
    "ours-modules": Row("sae_accel", "distribute_modules", activations_to_one, {"distribute_modules": True}),
    "ours-latents": Row("sae_accel", "distribute_latents", latents, {"distribute_latents": True}),
    "sparsify": Row("sparsify", "alone"),
    "sparsify-ddp": Row("sparsify", "DDP", parameters(2)),
    "sparsify-modules": Row("sparsify", "distribute_modules", activations_to_all, {"distribute_modules": True}),
}

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError
from ..models.configuration_head import HeadConfig
from ..models.configuration_sae import SaeConfig
from ..models.configuration_transcoder import TranscoderConfig


CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"


def read_head(config_path: str | Path, weights_path: str | Path) -> tuple[HeadConfig, dict[str, Tensor]]:
    """
    Reads a head that sparsify wrote, in any version of its format since June 2024.

    What keys mean where they are absent: no transcoder, no skip connection, `topk`. A file with `signed` selects
    latents by magnitude and keeps their sign. A file with a skip connection is a transcoder, whatever it says.
    Transcoders of before February 2025 took `b_dec` from their input, which no file tells: load those with
    `apply_b_dec_to_input=True`.

    Args:
        config_path (`str` or `Path`): Its `cfg.json`.
        weights_path (`str` or `Path`): Its `sae.safetensors`.

    Returns:
        `tuple[HeadConfig, dict]`: our config, and tensors by our names.

    Raises:
        `InputError`: if a file cannot be read, or the two disagree.
    """
    try:
        keys = json.loads(Path(config_path).read_text())
        tensors = _current_names(load_file(weights_path))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"The sparsify head in {str(Path(config_path).parent)!r} cannot be read: {error}.") from error
    if missing := {"encoder.weight", "encoder.bias", "b_dec"} - set(tensors):
        raise InputError(
            f"{str(weights_path)!r} has no tensor {min(missing)!r}; it holds {', '.join(sorted(tensors))}."
        )
    config = _config(keys, tensors)
    expected = (config.num_latents, keys.get("d_in", config.d_in))
    if tuple(tensors["encoder.weight"].shape) != expected:
        raise InputError(
            f"{str(config_path)!r} says (num_latents, d_in) = {expected}, but encoder.weight has shape "
            f"{tuple(tensors['encoder.weight'].shape)}."
        )
    return config, tensors


def _config(keys: dict, tensors: dict[str, Tensor]) -> HeadConfig:
    num_latents, d_in = tensors["encoder.weight"].shape
    shared = dict(
        d_in=d_in,
        # The files of runs that gave an expansion factor say 0.
        num_latents=keys.get("num_latents")
        or keys.get("d_sae")
        or d_in * keys.get("expansion_factor", num_latents // d_in),
        expansion_factor=keys.get("expansion_factor", num_latents // d_in),
        k=keys.get("k", 32),
        activation="signed_topk" if keys.get("signed") else keys.get("activation", "topk"),
        encoder_only="W_dec" not in tensors,
    )
    if keys.get("transcode") or keys.get("skip_connection"):
        skip = bool(keys.get("skip_connection"))
        return TranscoderConfig(d_out=tensors["b_dec"].shape[0], skip_connection=skip, **shared)
    return SaeConfig(normalize_decoder=keys.get("normalize_decoder", True), **shared)


def _current_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The oldest files call the encoder `W_enc` (d_in, num_latents) and `b_enc`."""
    if "W_enc" in tensors:
        tensors["encoder.weight"] = tensors.pop("W_enc").t().contiguous()
        tensors["encoder.bias"] = tensors.pop("b_enc", torch.zeros(len(tensors["encoder.weight"])))
    return tensors

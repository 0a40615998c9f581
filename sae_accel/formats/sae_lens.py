"""
Reads and writes heads of SAELens, before and since version 6: `cfg.json` and `sae_weights.safetensors`.

The keys of older versions are first translated into the keys of version 6. A scale of the inputs
(`expected_average_only_in`) is folded into the weights, so that the loaded head reads raw activations.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import InputError
from ..common.files import write_tensors
from ..common.run_files import folders_of
from ..models.configuration_head import HeadConfig
from ..models.configuration_sae import SaeConfig
from ..models.configuration_transcoder import TranscoderConfig
from .foreign import ForeignHead, Source, foreign_head, full, last_part, require, weigh_by_norms
from .hook_names import lens_name, module_of
from .place import Place
from .tensor_file import TensorFile, open_tensors


CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"
# Files without a version, or with an older one, are read by the rules of the time before.
VERSION = "6.0.0"

_ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "signed_topk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
# Tensors that only heads with some activations have.
_OF_ACTIVATIONS = {
    "threshold": ("jumprelu", "batchtopk"),
    "log_threshold": ("jumprelu", "batchtopk"),
    "topk_threshold": ("jumprelu", "batchtopk"),
    "b_gate": ("gated",),
    "b_mag": ("gated",),
    "r_mag": ("gated",),
}
_NORMS = {
    None: None,
    "none": None,
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": None,
}


def find(files: list[str], origin: str) -> Iterator[Place]:
    """Yields the heads among the files of a folder or repo."""
    for folder, inside in folders_of(files):
        if {CONFIG_FILE, WEIGHTS_FILE} <= inside.keys():
            roles = {"config": inside[CONFIG_FILE], "weights": inside[WEIGHTS_FILE]}
            if SCALER_FILE in inside:
                roles["scaler"] = inside[SCALER_FILE]
            yield Place(folder, roles, origin, hookpoint=module_of(folder.split("/")[0], last_part(origin)))


def open_head(place: Place) -> ForeignHead:
    """
    Reads a head's configuration, and finds its tensors. The average norm of the inputs is folded into the tensors, and
    so are the norms of decoder rows if the head weighs its latents by them.

    Raises:
        `InputError`: if a file cannot be read, the configuration and the weights disagree, or this kind of head is not
            known.
    """
    stored = place.json("config")
    keys = _current(stored)
    architecture, file = keys.get("architecture", "standard"), open_tensors(place.paths["weights"])
    if not isinstance(architecture, str) or architecture not in _ACTIVATIONS:
        raise InputError(f"it is a {architecture!r} of SAELens; {', '.join(_ACTIVATIONS)} can be read.")
    transcoder = "transcoder" in architecture
    _check_tensors(file, architecture, is_named="architecture" in stored)
    norm = keys.get("normalize_activations")
    if norm not in _NORMS or (transcoder and norm not in (None, "none")):
        raise InputError(f"its inputs are normalised by {norm!r}, which is not supported.")
    scale = _scale(place) if norm == "expected_average_only_in" else 1.0
    metadata = keys["metadata"]
    lm, hooks = metadata.get("model_name"), (metadata.get("hook_name"), metadata.get("hook_name_out"))
    by_norm = keys.get("rescale_acts_by_decoder_norm", False)
    factors = _factors(file)
    return foreign_head(
        file,
        _sources(file, architecture, scale, own=by_norm or factors is not None),
        place,
        transcoder=transcoder,
        declared={"d_in": keys.get("d_in"), "num_latents": keys.get("d_sae"), "d_out": keys.get("d_out")},
        finish=weigh_by_norms if by_norm else None if factors is None else partial(_multiply_rows, factors),
        k=keys.get("k"),
        activation=_ACTIVATIONS[architecture],
        normalize_input=_NORMS[norm],
        apply_b_dec_to_input=not transcoder and keys.get("apply_b_dec_to_input", True),
        hookpoint=_hookpoint(metadata, transcoder),
        source=_read_module(metadata) if transcoder else None,
        aliases=[hook for hook in hooks if hook] or None,
        base_model_name_or_path=lm,
    )


def write_head(folder: Path, config: HeadConfig, tensors: dict[str, Tensor]) -> None:
    """
    Writes a head in the layout of SAELens 6.

    Args:
        folder (`Path`): The folder to write; made if it does not exist.
        config (`HeadConfig`): The head's config.
        tensors (`dict[str, torch.Tensor]`): The head's state dict.

    Raises:
        `InputError`: if SAELens has no such head.
    """
    keys = config_of(config)
    weights = {
        "W_enc": tensors["encoder.weight"].t(),  # (d_in, num_latents)
        "W_dec": tensors["W_dec"],  # (num_latents, d_out)
        "b_dec": tensors["b_dec"],
    }
    if keys["architecture"] == "gated":
        weights |= {"b_gate": tensors["encoder.bias"], "b_mag": tensors["b_mag"], "r_mag": tensors["r_mag"]}
    else:
        weights["b_enc"] = tensors["encoder.bias"]
    weights |= {name: tensors[name] for name in ("threshold", "W_skip") if name in tensors}
    dtype = str(weights["W_dec"].dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, weights)
    (folder / CONFIG_FILE).write_text(json.dumps(keys | {"dtype": dtype}, indent=2) + "\n")


def config_of(config: HeadConfig) -> dict[str, Any]:
    """
    Returns a head's `cfg.json` for SAELens 6.

    Raises:
        `InputError`: if SAELens has no such head.
    """
    if config.kind not in (SaeConfig.kind, TranscoderConfig.kind):
        raise InputError(f"it is a {config.title}, which SAELens does not have.")
    transcoder = config.kind == TranscoderConfig.kind
    architecture = {
        "topk": "topk",
        "signed_topk": "abstopk",
        "relu": "standard",
        "gated": "gated",
        "jumprelu": "jumprelu",
        "batchtopk": "jumprelu",
    }.get(config.activation)
    if transcoder:
        start = {"relu": "", "jumprelu": "jumprelu_", "batchtopk": "jumprelu_"}.get(config.activation)
        architecture = None if start is None else f"{start}{'skip_' if config.skip_connection else ''}transcoder"
    if architecture is None:
        kind = "a transcoder" if transcoder else "an SAE"
        raise InputError(f"it is {kind} with activation {config.activation}, which SAELens does not have.")
    if transcoder and config.apply_b_dec_to_input:
        raise InputError("it is a transcoder that takes b_dec from its input, which SAELens does not have.")
    norms = {None: "none", "layer_norm": "layer_norm", "constant_norm": "constant_norm_rescale"}
    keys: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.num_latents,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": norms[config.normalize_input],
        "reshape_activations": "none",
    }
    if architecture in ("topk", "abstopk"):
        keys |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if transcoder:
        keys["d_out"] = config.d_out
    return keys | {"metadata": _metadata(config, transcoder)}


def _metadata(config: HeadConfig, transcoder: bool) -> dict[str, Any]:
    hookpoint = config.hookpoint or ""
    aliases = [name for name in config.aliases or [] if name.startswith(("blocks.", "hook_"))]
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": config.base_model_name_or_path,
        "hook_name": aliases[0] if aliases else lens_name(hookpoint, output=not transcoder) or hookpoint,
        "hf_hook_name": hookpoint or None,
    }
    if transcoder:
        metadata["hook_name_out"] = aliases[1] if len(aliases) > 1 else lens_name(hookpoint) or hookpoint
    return metadata


def _current(keys: dict[str, Any]) -> dict[str, Any]:
    """Translates the keys of any version into the keys of version 6, with `metadata`."""
    metadata = keys.get("metadata") or {}
    version = keys.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version and int(str(version).split(".")[0]) >= 6:
        return keys | {"metadata": metadata}
    keys = {"architecture": "standard"} | keys | ({"hook_name": keys["hook_point"]} if "hook_point" in keys else {})
    activation = keys.get("activation_fn") or keys.get("activation_fn_str") or "relu"
    if activation == "topk" and keys["architecture"] == "standard":
        keys |= {"architecture": "topk", "k": (keys.get("activation_fn_kwargs") or {}).get("k")}
    elif activation not in ("relu", "topk"):
        raise InputError(f"its activation is {activation!r} of SAELens, which is not supported.")
    if isinstance(keys.get("normalize_activations"), bool):
        keys["normalize_activations"] = "expected_average_only_in" if keys["normalize_activations"] else "none"
    return keys | {"metadata": metadata | keys}


def _scale(place: Place) -> float:
    """Returns the number that inputs are multiplied by: `sqrt(d_in)` over their average norm."""
    scale = place.given.pop("input_scale", None)
    if scale is None and "scaler" in place.paths:
        scale = place.json("scaler").get("scaling_factor")
    if scale is None:
        raise InputError(
            "its inputs are multiplied by sqrt(d_in) over their average norm, and its files do not hold this number. "
            "Give it as input_scale, or give input_scale=1 if your inputs are multiplied already."
        )
    if not 0 < float(scale) < math.inf:
        raise InputError(
            f"input_scale is {scale}; it must be sqrt(d_in) over the average norm of the inputs, above 0."
        )
    return float(scale)


def _check_tensors(file: TensorFile, architecture: str, is_named: bool) -> None:
    """
    Checks that the weights fit the architecture. Files from before the key `architecture` existed count as `standard`.
    """
    activation, transcoder = _ACTIVATIONS[architecture], "transcoder" in architecture
    unused = [name for name in file.shapes if activation not in _OF_ACTIVATIONS.get(name, (activation,))]
    unused += ["W_skip"] if "W_skip" in file.shapes and not transcoder else []
    if unused:
        says = f"says {architecture!r}" if is_named else f"names no architecture, for which {architecture!r} is taken"
        raise InputError(
            f"its {CONFIG_FILE} {says}, but its weights hold {', '.join(sorted(unused))}, which this architecture "
            f"does not have. Set its architecture to one of {', '.join(_ACTIVATIONS)}."
        )


def _sources(file: TensorFile, architecture: str, scale: float, own: bool) -> dict[str, Source | Tensor]:
    sources: dict[str, Source | Tensor] = {
        "encoder.weight": Source("W_enc", transposed=True, factor=scale),
        "encoder.bias": Source("b_gate" if architecture == "gated" else "b_enc", copied=own),
        "W_dec": Source("W_dec", factor=1 / scale, copied=own),
        "b_dec": Source("b_dec", factor=1 / scale),
    }
    if architecture == "gated":
        sources |= {"b_mag": Source("b_mag"), "r_mag": Source("r_mag")}
    if "W_skip" in file.shapes:
        sources["W_skip"] = Source("W_skip")
    if _ACTIVATIONS[architecture] in ("jumprelu", "batchtopk"):
        sources["threshold"] = _threshold(file)
    return sources


def _threshold(file: TensorFile) -> Source | Tensor:
    if "threshold" in file.shapes and file.shapes["threshold"]:
        return Source("threshold")
    if "log_threshold" in file.shapes:
        return file.whole("log_threshold").exp()
    name = next((name for name in ("threshold", "topk_threshold") if name in file.shapes), "threshold")
    require(file, name, "W_dec")
    return full(file.whole(name), file.shapes["W_dec"][0])


def _factors(file: TensorFile) -> Tensor | None:
    """Returns the factor per latent, `(num_latents,)`, that an old kind of fine-tuning left; None if all are 1."""
    factors = file.whole("scaling_factor") if "scaling_factor" in file.shapes else None
    return None if factors is None or torch.allclose(factors, torch.ones_like(factors)) else factors


def _multiply_rows(factors: Tensor, tensors: dict[str, Tensor]) -> None:
    tensors["W_dec"].mul_(factors[:, None])


def _hookpoint(metadata: dict[str, Any], transcoder: bool) -> str | None:
    if metadata.get("hook_head_index") is not None:
        return None
    if not transcoder:
        return _module(metadata, "hf_hook_name", "hook_name")
    # A transcoder reads its module's own input, unless it reads another module's output.
    reads_mlp = str(metadata.get("hook_name")).endswith("mlp.hook_in")
    known = _read_module(metadata) or reads_mlp
    return _module(metadata, "hf_hook_name_out", "hook_name_out") if known else None


def _read_module(metadata: dict[str, Any]) -> str | None:
    return module_of(metadata.get("hf_hook_name"), None)


def _module(metadata: dict[str, Any], *names: str) -> str | None:
    found = (module_of(metadata.get(name), metadata.get("model_name")) for name in names)
    return next((module for module in found if module), None)

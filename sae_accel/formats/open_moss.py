"""Llama Scope (arXiv:2410.20526) and what OpenMOSS's Llamascopium writes."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ..errors import InputError
from .folders import folders_of
from .foreign import ForeignHead, Place, Source, foreign_head, full, weigh_by_norms
from .hook_names import module_of
from .tensor_file import open_tensors


OLD_FILES = ("hyperparams.json", "checkpoints/final.safetensors")
NEW_FILES = ("config.json", "sae_weights.safetensors")
_LLAMA = "meta-llama/Llama-3.1-8B"
_ACTIVATIONS = {"jumprelu": "jumprelu", "relu": "relu", "topk": "topk", "batchtopk": "batchtopk"}


def find(files: list[str], origin: str) -> Iterator[Place]:
    """Heads among the files of a folder or repo."""
    there = set(files)
    for folder, inside in folders_of(files):
        for names in (OLD_FILES, NEW_FILES):
            paths = [str(PurePosixPath(folder) / name) for name in names]
            if names[0] in inside and paths[1] in there:
                yield Place(folder, {"config": paths[0], "weights": paths[1]}, origin)


def open_head(place: Place) -> ForeignHead:
    """
    Reads a head's configuration, and finds its tensors. The average norm of its inputs is folded into these. Llama
    Scope's threshold, one number for all latents, is multiplied by the same factor as SAELens does.

    Raises:
        `InputError`: if a file cannot be read, or there is no such head here.
    """
    keys, file = place.json("config"), open_tensors(place.paths["weights"])
    kind = keys.get("sae_type", "sae")
    if kind != "sae":
        raise InputError(f"it is a {kind!r} of Llamascopium, of which 'sae' can be read.")
    activation = _ACTIVATIONS.get(keys.get("act_fn", "jumprelu"))
    if activation is None:
        raise InputError(f"its activation is {keys['act_fn']!r}, of which {', '.join(_ACTIVATIONS)} can be read.")
    old = "encoder.weight" in file.shapes
    by_norm = keys.get("sparsity_include_decoder_norm", False) and not old
    d_in = file.shapes["encoder.weight" if old else "W_E"][1 if old else 0]
    scale = _scale(keys, d_in)
    reads, writes = keys.get("hook_point_in"), keys.get("hook_point_out")
    transcoder = reads != writes and writes is not None
    sources = _sources(file, old, scale, activation, keys)
    return foreign_head(
        file,
        sources,
        place,
        transcoder=transcoder,
        declared={"d_in": keys.get("d_model"), "num_latents": keys.get("d_sae")},
        finish=weigh_by_norms if by_norm else None,
        k=keys.get("top_k") if activation in ("topk", "batchtopk") else None,
        activation=activation,
        apply_b_dec_to_input=False,
        hookpoint=None if transcoder else module_of(reads, _LLAMA if old else "llama"),
        aliases=[hook for hook in dict.fromkeys((reads, writes)) if hook] or None,
        base_model_name_or_path=keys.get("model_name") or (_LLAMA if old else None),
    )


def _sources(file: Any, old: bool, scale: float, activation: str, keys: dict[str, Any]) -> dict[str, Any]:
    by_norm = keys.get("sparsity_include_decoder_norm", False) and not old
    weight, bias, decoder, last = (
        ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias") if old else ("W_E", "b_E", "W_D", "b_D")
    )
    sources: dict[str, Any] = {
        "encoder.weight": Source(weight, transposed=not old, factor=scale),
        "encoder.bias": Source(bias, copied=by_norm),
        "W_dec": Source(decoder, transposed=old, factor=1 / scale, copied=by_norm),
        "b_dec": Source(last, factor=1 / scale),
    }
    if activation in ("jumprelu", "batchtopk"):
        num_latents = file.shapes[bias][0]
        logs = [name for name in file.shapes if name.endswith("log_jumprelu_threshold")]
        if logs:
            sources["threshold"] = full(file.whole(logs[0]).exp().squeeze(), num_latents)
        else:
            sources["threshold"] = full(keys.get("jump_relu_threshold", 0.0) * scale, num_latents)
    return sources


def _scale(keys: dict[str, Any], d_in: int) -> float:
    norms = keys.get("dataset_average_activation_norm") or {}
    norm = norms.get("in") or norms.get(keys.get("hook_point_in"))
    return d_in**0.5 / norm if norm else 1.0

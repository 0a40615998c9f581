"""
Reads Llama Scope (arXiv:2410.20526) and heads that OpenMOSS's Llamascopium writes.

Most of these heads were trained on inputs that one number scales to an average norm of sqrt(d). Our heads read raw
activations, so this number is folded into the weights here.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from ..common.errors import InputError
from ..common.run_files import folders_of
from .foreign import ForeignHead, Source, foreign_head, full, names_in, require, weigh_by_norms
from .hook_names import module_of
from .place import Place
from .tensor_file import TensorFile, open_tensors


OLD_FILES = ("hyperparams.json", "checkpoints/final.safetensors")
NEW_FILES = ("config.json", "sae_weights.safetensors")
_LLAMA = "meta-llama/Llama-3.1-8B"
# For each way to normalise inputs: None if a constant factor is folded into the weights, or else our name for it.
_NORMS = {"dataset-wise": None, "inference": None, "none": None, None: None, "token-wise": "constant_norm"}
_ACTIVATIONS = {"jumprelu": "jumprelu", "relu": "relu", "topk": "topk", "batchtopk": "batchtopk"}


def find(files: list[str], origin: str) -> Iterator[Place]:
    """Yields the heads among the files of a folder or repo."""
    there = set(files)
    for folder, inside in folders_of(files):
        for names in (OLD_FILES, NEW_FILES):
            paths = [str(PurePosixPath(folder) / name) for name in names]
            if names[0] in inside and paths[1] in there:
                yield Place(folder, {"config": paths[0], "weights": paths[1]}, origin)


def open_head(place: Place) -> ForeignHead:
    """
    Reads a head's configuration, and finds its tensors. The average norm of the inputs is folded into the tensors.
    Llama Scope has one threshold for all latents; it is multiplied by the same factor, as SAELens does.

    Raises:
        `InputError`: if a file cannot be read, or this kind of head is not known.
    """
    keys, file = place.json("config"), open_tensors(place.paths["weights"])
    kind = keys.get("sae_type", "sae")
    if kind != "sae":
        raise InputError(f"it is a {kind!r} of Llamascopium; 'sae' can be read.")
    activation = _ACTIVATIONS.get(keys.get("act_fn", "jumprelu"))
    if activation is None:
        raise InputError(f"its activation is {keys['act_fn']!r}; {', '.join(_ACTIVATIONS)} can be read.")
    old = "encoder.weight" in file.shapes
    require(file, *_names(old))
    by_norm = keys.get("sparsity_include_decoder_norm", False) and OLD_FILES[0] not in place.files["config"]
    d_in = file.shapes[_names(old)[0]][1 if old else 0]
    norm = keys.get("norm_activation", "dataset-wise")
    if norm not in _NORMS:
        raise InputError(f"its inputs are normalised by {norm!r}; {', '.join(map(str, _NORMS))} can be read.")
    scales = [_scale(keys, file, side, d_in) if norm == "dataset-wise" else 1.0 for side in ("in", "out")]
    reads, writes = keys.get("hook_point_in"), keys.get("hook_point_out")
    transcoder = reads != writes and writes is not None
    return foreign_head(
        file,
        _sources(file, old, scales, by_norm, activation, keys),
        place,
        transcoder=transcoder,
        declared={"d_in": keys.get("d_model"), "num_latents": keys.get("d_sae")},
        finish=weigh_by_norms if by_norm else None,
        k=keys.get("top_k") if activation in ("topk", "batchtopk") else None,
        activation=activation,
        normalize_input=_NORMS[norm],
        apply_b_dec_to_input=False,
        hookpoint=None if transcoder else module_of(reads, _LLAMA if old else "llama"),
        aliases=[hook for hook in dict.fromkeys((reads, writes)) if hook] or None,
        base_model_name_or_path=keys.get("model_name") or (_LLAMA if old else None),
    )


def _names(old: bool) -> tuple[str, str, str, str]:
    if old:
        return "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"
    return "W_E", "b_E", "W_D", "b_D"


def _sources(
    file: TensorFile, old: bool, scales: list[float], by_norm: bool, activation: str, keys: dict[str, Any]
) -> dict[str, Any]:
    weight, bias, decoder, last = _names(old)
    reads, writes = scales
    sources: dict[str, Any] = {
        "encoder.weight": Source(weight, transposed=not old, factor=reads),
        "encoder.bias": Source(bias, copied=by_norm),
        "W_dec": Source(decoder, transposed=old, factor=1 / writes, copied=by_norm),
        "b_dec": Source(last, factor=1 / writes),
    }
    if activation in ("jumprelu", "batchtopk"):
        sources["threshold"] = _threshold(file, keys, file.shapes[bias][0], reads)
    return sources


def _threshold(file: TensorFile, keys: dict[str, Any], num_latents: int, scale: float) -> Tensor:
    for name in file.shapes:
        if name.endswith("log_jumprelu_threshold"):
            return full(file.whole(name).exp().squeeze(), num_latents)
    if "jump_relu_threshold" not in keys:
        raise InputError(f"{str(file.path)!r} has no threshold; it holds {names_in(file)}.")
    return full(keys["jump_relu_threshold"] * scale, num_latents)


def _scale(keys: dict[str, Any], file: TensorFile, side: str, d: int) -> float:
    """Returns the factor for activations: sqrt(d) over their average norm, from the configuration or the weights."""
    hook, norms = keys.get(f"hook_point_{side}"), keys.get("dataset_average_activation_norm") or {}
    norm = norms.get(side) or norms.get(hook)
    name = f"dataset_average_activation_norm.{hook}"
    if norm is None and name in file.shapes:
        norm = file.whole(name).item()
    return d**0.5 / norm if norm else 1.0

"""Reads heads of saprmarks' dictionary_learning: `ae.pt` and `config.json`."""

from collections.abc import Iterator
from typing import Any

from ..common.errors import InputError
from ..common.run_files import folders_of
from .foreign import ForeignHead, Source, foreign_head, full, last_part, number_in, require
from .hook_names import module_of
from .place import Place
from .tensor_file import TensorFile, open_tensors


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"
# For each class: the activation, and whether the decoder's bias is subtracted from the input.
_CLASSES = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "GatedAutoEncoder": ("gated", True),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batchtopk", True),
    "MatryoshkaBatchTopKSAE": ("batchtopk", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}


def find(files: list[str], origin: str) -> Iterator[Place]:
    """Yields the heads among the files of a folder or repo."""
    for folder, inside in folders_of(files):
        if {CONFIG_FILE, WEIGHTS_FILE} <= inside.keys():
            roles = {"config": inside[CONFIG_FILE], "weights": inside[WEIGHTS_FILE]}
            layer = number_in(folder, r"resid_post_layer_(\d+)")
            hook = None if layer is None else f"blocks.{layer}.hook_resid_post"
            yield Place(folder, roles, origin, hookpoint=module_of(hook, f"{last_part(origin)}/{folder}"))


def open_head(place: Place) -> ForeignHead:
    """
    Reads a head's configuration, and finds its tensors.

    Raises:
        `InputError`: if a file cannot be read, the configuration and the weights disagree, or this kind of head is not
            known.
    """
    keys = place.json("config").get("trainer") or {}
    kind, file = keys.get("dict_class"), open_tensors(place.paths["weights"])
    if kind not in _CLASSES:
        raise InputError(f"its dict_class is {kind!r}; {', '.join(_CLASSES)} can be read.")
    activation, apply_b_dec_to_input = _CLASSES[kind]
    hook = None if keys.get("layer") is None else f"blocks.{keys['layer']}.hook_resid_post"
    submodule = keys.get("submodule_name") or "resid_post"
    return foreign_head(
        file,
        _sources(file, activation),
        place,
        declared={"d_in": keys.get("activation_dim"), "num_latents": keys.get("dict_size")},
        k=int(keys["k"]) if keys.get("k") is not None else None,
        activation=activation,
        apply_b_dec_to_input=apply_b_dec_to_input,
        hookpoint=module_of(hook, keys.get("lm_name")) if "resid_post" in submodule else None,
        aliases=[hook] if hook and "resid_post" in submodule else None,
        base_model_name_or_path=keys.get("lm_name"),
    )


def _sources(file: TensorFile, activation: str) -> dict[str, Any]:
    own = "W_enc" in file.shapes
    bias = next((name for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in file.shapes), "b_dec")
    sources: dict[str, Any] = {
        "encoder.weight": Source("W_enc", transposed=True) if own else Source("encoder.weight"),
        "encoder.bias": Source("b_enc" if own else "encoder.bias"),
        "W_dec": Source("W_dec") if own else Source("decoder.weight", transposed=True),
        "b_dec": Source(bias),
    }
    if activation == "gated":
        sources |= {"encoder.bias": Source("gate_bias"), "b_mag": Source("mag_bias"), "r_mag": Source("r_mag")}
    if activation in ("jumprelu", "batchtopk"):
        # A topk head has a threshold too, but it selects by rank.
        require(file, "threshold", "b_enc" if own else "encoder.bias")
        num_latents = file.shapes["b_enc" if own else "encoder.bias"][0]
        sources["threshold"] = full(file.whole("threshold"), num_latents)
    return sources

"""
Reads heads that are one file saved by torch: OpenAI's, Goodfire's, Qwen Scope's and files like them.

These files have no configuration, so the names of their tensors tell the library, and the file's path tells the
hookpoint.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.errors import InputError
from ..common.run_files import folders_of
from .foreign import ForeignHead, Source, foreign_head, last_part, names_in, number_in
from .hook_names import module_of
from .place import Place
from .tensor_file import TorchFile


# Files that a run leaves beside heads.
_NOT_HEADS = re.compile(r"(training_state|optimizer|scheduler|lr_scheduler|state|rank_|trainer_state|rng_state)")
_OPENAI_PLACES = {"resid_post_mlp": "resid_post", "resid_delta_mlp": "mlp_out", "resid_delta_attn": "attn_out"}


def find(files: list[str], origin: str) -> Iterator[Place]:
    """Yields the heads among the files of a folder or repo."""
    for _, inside in folders_of(files):
        for name, path in inside.items():
            if name.endswith((".pt", ".pth")) and not _NOT_HEADS.match(name):
                named = str(PurePosixPath(path).with_suffix("")).removesuffix(".sae")
                hook = _hook(f"{origin}/{named}")
                lm = "gpt2" if hook and "resid_" in f"{origin}/{named}" else f"{last_part(origin)}/{named}"
                yield Place(named, {"weights": path}, origin, hookpoint=module_of(hook, lm))


def open_head(place: Place) -> ForeignHead:
    """
    Finds a head's tensors. OpenAI's TopK heads normalise their input; none of the other libraries' heads subtracts
    `b_dec` from it.

    Raises:
        `InputError`: if the file cannot be read, its tensors are not those of a known head, or it does not tell k.
    """
    file = TorchFile(Path(place.paths["weights"]))
    names = file.shapes.keys()
    hook = _hook(f"{place.origin}/{place.name}")
    shared: dict[str, Any] = {"hookpoint": place.hookpoint, "aliases": [hook] if hook else None}
    if {"encoder.weight", "pre_bias", "latent_bias"} <= names:
        return _openai(file, place, shared)
    if "encoder_linear.weight" in names:
        sources = _linear(
            "encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias"
        )
        return foreign_head(file, sources, place, k=None, activation="relu", apply_b_dec_to_input=False, **shared)
    if {"W_enc", "W_dec", "b_enc", "b_dec"} <= names:
        k = place.given.get("k", number_in(place.origin, r"L0_(\d+)"))
        if k is None:
            raise InputError("its file does not tell how many latents are active for each token. Give k.")
        sources = _linear("W_enc", "b_enc", "W_dec", "b_dec")
        return foreign_head(file, sources, place, k=k, activation="topk", apply_b_dec_to_input=False, **shared)
    if {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"} <= names:
        sources = _linear("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
        return foreign_head(file, sources, place, k=None, activation="relu", apply_b_dec_to_input=False, **shared)
    raise InputError(f"{str(file.path)!r} holds tensors that fit no known kind of head. It has {names_in(file)}.")


def _openai(file: TorchFile, place: Place, shared: dict[str, Any]) -> ForeignHead:
    """Finds the tensors of an OpenAI head. See arXiv:2406.04093, and the repository openai/sparse_autoencoder."""
    kind = file.values.get("activation", "ReLU")
    if kind not in ("TopK", "ReLU"):
        raise InputError(f"its activation is {kind!r}; TopK and ReLU can be read.")
    tied = "decoder.weight" not in file.shapes
    sources = {
        "encoder.weight": Source("encoder.weight"),
        "encoder.bias": Source("latent_bias"),
        "W_dec": Source("encoder.weight") if tied else Source("decoder.weight", transposed=True),
        "b_dec": Source("pre_bias"),
    }
    k = file.values.get("activation_state_dict", {}).get("k")
    if kind == "TopK" and k is None and "k" not in place.given:
        raise InputError("its file does not tell how many latents are active for each token. Give k.")
    return foreign_head(
        file,
        sources,
        place,
        k=None if kind == "ReLU" or k is None else int(k),
        activation="topk" if kind == "TopK" else "relu",
        normalize_input="layer_norm" if kind == "TopK" else None,
        **shared,
    )


def _linear(weight: str, bias: str, decoder: str, last: str) -> dict[str, Source]:
    return {
        "encoder.weight": Source(weight),
        "encoder.bias": Source(bias),
        "W_dec": Source(decoder, transposed=True),
        "b_dec": Source(last),
    }


def _hook(name: str) -> str | None:
    """Returns the TransformerLens hook that a file's path tells."""
    for place, kind in _OPENAI_PLACES.items():
        if place in name and (layer := number_in(name, r"/(\d+)$")) is not None:
            return f"blocks.{layer}.hook_{kind}"
    layer = number_in(name, r"(?:layer|[-_/]l)_?(\d+)$")
    return None if layer is None else f"blocks.{layer}.hook_resid_post"

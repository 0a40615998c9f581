"""
Reads Gemma Scope (arXiv:2408.05147), `params.npz`, and Gemma Scope 2, `params.safetensors` with `config.json`.

The first Gemma Scope has no configuration: the names of the repo and its folders tell the LM, the layer and the kind
of activation.
"""

import re
from collections.abc import Iterator
from typing import Any

from ..common.errors import InputError
from ..common.run_files import folders_of
from .foreign import ForeignHead, Source, foreign_head, last_part, number_in
from .hook_names import module_of
from .place import Place
from .tensor_file import open_tensors


WEIGHTS_FILES = ("params.npz", "params.safetensors")
CONFIG_FILE = "config.json"
_LMS = {"2b": "google/gemma-2-2b", "9b": "google/gemma-2-9b", "27b": "google/gemma-2-27b"}


def find(files: list[str], origin: str) -> Iterator[Place]:
    """Yields the heads among the files of a folder or repo."""
    for folder, inside in folders_of(files):
        for name in WEIGHTS_FILES:
            if name in inside:
                roles = {"weights": inside[name]}
                if CONFIG_FILE in inside:
                    roles["config"] = inside[CONFIG_FILE]
                hookpoint = module_of(_hook(folder, origin), "gemma-scope")
                yield Place(folder, roles, origin, hookpoint="embed_tokens" if _embeds(folder) else hookpoint)


def open_head(place: Place) -> ForeignHead:
    """
    Finds a head's tensors. All heads are JumpReLU, and none subtracts `b_dec` from its input.

    Raises:
        `InputError`: if a file cannot be read, or this kind of head is not known.
    """
    keys = place.json("config") if "config" in place.paths else {}
    if keys.get("architecture", "jump_relu") != "jump_relu":
        raise InputError(f"it is a {keys['architecture']!r} of Gemma Scope; jump_relu can be read.")
    file = open_tensors(place.paths["weights"])
    names = {name.lower(): name for name in file.shapes}
    if len(file.shapes.get(names.get("w_dec", ""), (0, 0))) != 2:
        raise InputError("it writes to several layers, and sae_accel reads heads that write to one.")
    # The embedding SAEs were trained on embeddings before Gemma multiplies them by sqrt(d).
    scale = file.shapes[names["w_dec"]][1] ** 0.5 if _embeds(place.name) and "w_dec" in names else 1.0
    sources = {
        "encoder.weight": Source(names.get("w_enc", "W_enc"), transposed=True, factor=1 / scale),
        "encoder.bias": Source("b_enc"),
        "W_dec": Source(names.get("w_dec", "W_dec"), factor=scale),
        "b_dec": Source("b_dec"),
        "threshold": Source("threshold"),
    }
    if "affine_skip_connection" in file.shapes:
        sources["W_skip"] = Source("affine_skip_connection", transposed=True)
    reads, predicts = keys.get("hf_hook_point_in"), keys.get("hf_hook_point_out")
    transcoder = "transcoder" in f"{last_part(place.origin)}/{place.name}" or "W_skip" in sources
    hook = _hook(place.name, place.origin)
    return foreign_head(
        file,
        sources,
        place,
        transcoder=transcoder,
        k=number_in(place.name, r"average_l0_(\d+)"),
        activation="jumprelu",
        apply_b_dec_to_input=False,
        hookpoint=module_of(predicts if transcoder else reads, None) or (None if transcoder else place.hookpoint),
        source=module_of(reads, None) if transcoder else None,
        aliases=[name for name in (hook, reads, predicts if transcoder else None) if name] or None,
        base_model_name_or_path=_lm(keys, place.origin),
    )


def _embeds(folder: str) -> bool:
    return "embedding" in folder


def _hook(folder: str, origin: str) -> str | None:
    """Returns the TransformerLens hook, by the layer in the folder's name and the kind in its name or the repo's."""
    layer, where = number_in(folder, r"layer_(\d+)"), f"{last_part(origin)}/{folder}"
    if _embeds(folder):
        return "hook_embed"
    kind = re.search(r"(?:^|[-_/])(res(?=$|[-_/i])|mlp|att|transcoder|clt)", where)
    if layer is None or kind is None:
        return None
    hooks = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
    return f"blocks.{layer}.{hooks[kind[1]]}" if kind[1] in hooks else f"blocks.{layer}.ln2.hook_normalized"


def _lm(keys: dict[str, Any], origin: str) -> str | None:
    if name := keys.get("model_name"):
        return name if name.startswith("google/") else f"google/{name}".replace("-v3", "-3")
    match = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)", origin)
    return match and _LMS[match[1]] + ("-it" if match[2] == "it" else "")

"""Reads sets of transcoders for circuit-tracer: a `layer_<i>.safetensors` for each layer, and `config.yaml`."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import yaml

from ..common.errors import InputError, one_line
from ..common.run_files import folders_of
from .foreign import ForeignHead, Source, foreign_head, last_part, number_in
from .hook_names import module_of
from .place import Place
from .tensor_file import open_tensors


CONFIG_FILE = "config.yaml"
_WEIGHTS_FILE = re.compile(r"layer_(\d+)\.safetensors")
# This hook is the MLP's own input, after the norm in front of it.
_MLP_INPUT = "mlp.hook_in"


def find(files: list[str], origin: str) -> Iterator[Place]:
    """Yields the heads among the files of a folder or repo."""
    for folder, inside in folders_of(files):
        for name, path in inside.items():
            if match := _WEIGHTS_FILE.fullmatch(name):
                roles = {"weights": path} | ({"config": inside[CONFIG_FILE]} if CONFIG_FILE in inside else {})
                hookpoint = module_of(f"blocks.{match[1]}.hook_mlp_out", last_part(origin))
                yield Place(str(PurePosixPath(folder) / f"layer_{match[1]}"), roles, origin, hookpoint=hookpoint)


def open_head(place: Place) -> ForeignHead:
    """
    Reads the configuration, and finds the tensors of one layer's transcoder.

    Raises:
        `InputError`: if a file cannot be read, or the configuration says `topk` without a k.
    """
    keys, file = _keys(place), open_tensors(place.paths["weights"])
    sources: dict[str, Any] = {
        "encoder.weight": Source("W_enc"),
        "encoder.bias": Source("b_enc"),
        "W_dec": Source("W_dec"),
        "b_dec": Source("b_dec"),
    }
    if "W_skip" in file.shapes:
        sources["W_skip"] = Source("W_skip")
    threshold = next((name for name in file.shapes if name.endswith("threshold")), None)
    by_rank = keys.get("activation") == "topk"
    if threshold is not None and not by_rank:
        sources["threshold"] = Source(threshold)
    k = place.given.get("k", keys.get("k"))
    if by_rank and k is None:
        raise InputError("its configuration says topk, but not how many latents are active per token. Give k.")
    layer, lm = number_in(place.paths["weights"].name, _WEIGHTS_FILE.pattern), keys.get("model_name")
    hooks = [f"blocks.{layer}.{keys.get(f'feature_{side}_hook', default)}" for side, default in _DEFAULT_HOOKS]
    own_input = keys.get("feature_input_hook", _MLP_INPUT) == _MLP_INPUT
    return foreign_head(
        file,
        sources,
        place,
        transcoder=True,
        k=k,
        activation="topk" if by_rank else "relu" if threshold is None else "jumprelu",
        hookpoint=module_of(hooks[1], lm or place.origin) if own_input else None,
        aliases=hooks,
        base_model_name_or_path=lm,
    )


_DEFAULT_HOOKS = (("input", _MLP_INPUT), ("output", "hook_mlp_out"))


def _keys(place: Place) -> dict[str, Any]:
    if "config" not in place.paths:
        return {}
    try:
        keys = yaml.safe_load(place.paths["config"].read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{str(place.paths['config'])!r} is not YAML: {one_line(error)}.") from error
    return keys if isinstance(keys, dict) else {}

"""
Reads and writes heads of EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

The format has changed several times since June 2024 without a version number, so the reader tells the variants apart
by their keys and by the names of their tensors.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..common.errors import InputError
from ..common.files import write_tensors
from ..common.run_files import folders_of
from ..models.configuration_head import HeadConfig
from ..models.configuration_sae import SaeConfig
from ..models.configuration_transcoder import TranscoderConfig
from .foreign import ForeignHead, Source, foreign_head, last_part
from .place import Place
from .tensor_file import open_tensors


CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
RUN_FILE = "config.json"
_HOOKPOINT = re.compile(r"(layers|h)\.\d+(\.\w+)*|layer_\d+|embed_tokens")


def find(files: list[str], origin: str) -> Iterator[Place]:
    """
    Yields the heads among the files of a folder or repo. Their names are hookpoints, except from before July 2024.
    """
    for folder, inside in folders_of(files):
        if {CONFIG_FILE, WEIGHTS_FILE} <= inside.keys():
            roles = {"config": inside[CONFIG_FILE], "weights": inside[WEIGHTS_FILE]}
            if folder and RUN_FILE in files:
                roles["run"] = RUN_FILE
            # If the path is one head's own folder, the folder's name can be its hookpoint.
            named = folder or (last_part(origin) if _HOOKPOINT.fullmatch(last_part(origin)) else "")
            yield Place(folder, roles, origin, hookpoint=_hookpoint(named))


def open_head(place: Place) -> ForeignHead:
    """
    Reads a head's configuration, and finds its tensors.

    A key that is absent means: no transcoder, no skip connection, `topk`. A file with `signed` selects latents by
    magnitude and keeps their sign. A file with a skip connection is a transcoder, even if it says otherwise.
    Transcoders from before February 2025 subtracted `b_dec` from their input, and no file tells this: load these with
    `apply_b_dec_to_input=True`.

    Raises:
        `InputError`: if a file cannot be read, or the configuration and the weights disagree.
    """
    keys, file = place.json("config"), open_tensors(place.paths["weights"])
    # The oldest files call the encoder W_enc, of shape (d_in, num_latents).
    oldest = "W_enc" in file.shapes
    weight = Source("W_enc", transposed=True) if oldest else Source("encoder.weight")
    sources: dict[str, Source | torch.Tensor] = {
        "encoder.weight": weight,
        "encoder.bias": Source("b_enc" if oldest else "encoder.bias"),
    }
    sources |= {name: Source(name) for name in ("W_dec", "b_dec", "W_skip") if name in file.shapes or name == "b_dec"}
    if oldest and "b_enc" not in file.shapes:
        sources["encoder.bias"] = torch.zeros(file.shapes["W_enc"][1])
    transcoder = bool(keys.get("transcode") or keys.get("skip_connection"))
    declared = {"d_in": keys.get("d_in"), "num_latents": keys.get("num_latents") or keys.get("d_sae")}
    if not declared["num_latents"] and keys.get("d_in") and keys.get("expansion_factor"):
        # Runs that set an expansion factor wrote 0 for num_latents.
        declared["num_latents"] = keys["d_in"] * keys["expansion_factor"]
    fields: dict[str, Any] = {} if transcoder else {"normalize_decoder": keys.get("normalize_decoder", True)}
    if transcoder and "W_skip" not in sources and keys.get("skip_connection"):
        raise InputError(
            f"{str(place.paths['config'])!r} says that there is a skip connection, but W_skip is missing."
        )
    return foreign_head(
        file,
        sources,
        place,
        transcoder=transcoder,
        declared=declared,
        k=keys.get("k", 32),
        activation="signed_topk" if keys.get("signed") else keys.get("activation", "topk"),
        encoder_only="W_dec" not in sources,
        base_model_name_or_path=place.json("run").get("model") if "run" in place.paths else None,
        **fields,
    )


def config_of(config: HeadConfig) -> dict[str, Any]:
    """
    Returns a head's `cfg.json` for sparsify 1.3.

    Raises:
        `InputError`: if sparsify has no such head.
    """
    transcoder = config.kind == TranscoderConfig.kind
    lacks = {
        f"kind {config.kind}": config.kind not in (SaeConfig.kind, TranscoderConfig.kind),
        f"activation {config.activation}": config.activation not in ("topk", "groupmax"),
        f"normalize_input {config.normalize_input}": config.normalize_input is not None,
        f"d_out {config.d_out} beside d_in {config.d_in}": config.d_out != config.d_in,
        f"apply_b_dec_to_input {config.apply_b_dec_to_input}": config.apply_b_dec_to_input == transcoder,
    }
    if wrong := [what for what, lacking in lacks.items() if lacking]:
        raise InputError(f"it has {wrong[0]}, which sparsify's format cannot express.")
    return {
        "activation": config.activation,
        "expansion_factor": config.expansion_factor or 0,
        "normalize_decoder": config.normalize_decoder,
        "num_latents": config.num_latents,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip_connection,
        "transcode": transcoder,
        "d_in": config.d_in,
    }


def write_head(folder: Path, config: HeadConfig, tensors: dict[str, torch.Tensor]) -> None:
    """
    Writes a head in the layout of sparsify 1.3.

    Args:
        folder (`Path`): The folder to write; made if it does not exist.
        config (`HeadConfig`): The head's config.
        tensors (`dict[str, torch.Tensor]`): The head's state dict.

    Raises:
        `InputError`: if sparsify has no such head.
    """
    keys = config_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(keys, indent=2) + "\n")


def _hookpoint(folder: str) -> str | None:
    first = folder.split("/")[0]
    if match := re.fullmatch(r"layer_(\d+)", first):
        # These SAEs read the inputs of blocks; the input of the first block is the embeddings.
        return f"layers.{int(match[1]) - 1}" if int(match[1]) else "embed_tokens"
    return first or None

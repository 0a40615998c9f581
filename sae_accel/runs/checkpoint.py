import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from ..common.errors import InputError
from ..common.quiet import quiet_files
from ..common.staging import staging_folder
from ..models import HeadModel


MANIFEST = "manifest.json"
STATE_FILE = "training_state.pt"
WEIGHTS = "model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_head(head: HeadModel, weights: Mapping[str, Tensor], folder: Path, process_index: int = 0) -> None:
    """
    Writes `config.json` and `model.safetensors` of a head, each file complete or absent.

    Args:
        head (`HeadModel`): What it is.
        weights (`Mapping[str, torch.Tensor]`): Its parameters, whole.
        folder (`Path`): Where; made if it does not exist.
        process_index (`int`, defaults to 0): Which process writes.
    """
    with staging_folder(folder, f"saving-{process_index}") as staging:
        with quiet_files():
            head.save_pretrained(staging, state_dict=dict(weights))
        folder.mkdir(parents=True, exist_ok=True)
        for file in staging.iterdir():
            os.replace(file, folder / file.name)


@contextmanager
def staged(folder: Path, process: PartialState) -> Iterator[Path]:
    """
    A folder for all processes to write into that takes the name `folder` once all is written, so that `folder` is
    complete or absent. A manifest with the size of each file goes with it.

    Args:
        folder (`Path`): Where every process sees the same.
        process (`PartialState`): This one.
    """
    staging = folder.with_name(f".{folder.name}.partial")
    if process.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    process.wait_for_everyone()
    yield staging
    process.wait_for_everyone()
    if process.is_main_process:
        _seal(staging)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
    process.wait_for_everyone()


def _seal(staging: Path) -> None:
    sizes = {}
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        sizes[str(file.relative_to(staging))] = file.stat().st_size
    (staging / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2) + "\n")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if missing_part(path) is None), None)


def missing_part(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, by its manifest; None if it is whole."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no readable {MANIFEST}"
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found:,} of {size:,} bytes"
    return None


def drop_old(output_dir: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints of a run; none if `keep` is None."""
    if keep is not None:
        for path in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(path)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """
    The run's state in a checkpoint, without that of heads.

    Raises:
        `InputError`: if the checkpoint does not exist or is not whole.
    """
    if not checkpoint.is_dir():
        raise InputError(f"There is no checkpoint folder {str(checkpoint)!r}. Name a folder such as checkpoint-1000.")
    if wrong := missing_part(checkpoint):
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} is not whole: {wrong}. Resume from another one, or set "
            "training.resume_from_checkpoint: true for the newest that is whole."
        )
    return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)


def check_fits(checkpoint: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """
    Checks that a checkpoint was written by such a run as is to go on from it.

    Args:
        checkpoint (`Path`): Its folder.
        state (`dict`): Of `load_state`.
        identity (`dict`): What must be the same, in words.

    Raises:
        `InputError`: if something differs.
    """
    for what, ours in identity.items():
        theirs = state["identity"][what]
        if theirs != ours:
            raise InputError(
                f"Checkpoint {str(checkpoint)!r} is of another recipe: it has {what} {theirs}, this run has "
                f"{ours}. Use the same."
            )


def random_state() -> dict[str, Any]:
    """The state of every generator of this process, in types that load without running code."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets every generator of this process as `random_state` found them."""
    random.setstate(state["python"])
    np.random.set_state((state["numpy"][0], np.array(state["numpy"][1], dtype=np.uint32), *state["numpy"][2:]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])

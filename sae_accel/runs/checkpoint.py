"""
The checkpoints of a run on disk: which exist, which is the newest complete one, and the state that one holds.

A checkpoint is complete if its manifest lists every file with its size, and the sizes are right; a kill never leaves a
folder that looks complete. The run's own manifest lists the checkpoints that the run has written. Only these are ever
deleted or renamed, and files that somebody else has put into one are kept.
"""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..common.errors import InputError, RunEnded, is_out_of_memory, one_line
from ..common.files import read_json, remove
from ..common.manifest import Manifest
from ..common.run_files import BEST, MANIFEST, TRAINER_STATE
from ..common.signals import NOTHING_SAVED
from ..processes.agreement import say


GO_ON = "To go on, set --training.resume_from_checkpoint true."
STATE_FILE = "training_state.pt"
# The version of the state file. It rises with each change of the content, so that no run misreads an older file.
FORMAT = 3
# The second pattern also matches checkpoints that a run has renamed because it went on from an older one.
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ANY_CHECKPOINT = re.compile(r"checkpoint-(\d+)(\.before-.*)?")


def checkpoints(output_dir: Path) -> list[Path]:
    """Lists the folders named like checkpoints, in the order of their steps."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps before a checkpoint, from its name or else from its state."""
    if match := _ANY_CHECKPOINT.fullmatch(checkpoint.name):
        return int(match[1])
    step = read_json(checkpoint / TRAINER_STATE).get("global_step")
    return step if isinstance(step, int) else 0


def newest_complete(output_dir: Path) -> Path | None:
    """
    Finds the complete checkpoint that was written last, or returns None. Without a run's manifest it is the one with
    the most steps.
    """
    manifest = Manifest.read(output_dir)
    own = [] if manifest is None else [output_dir / name for name in manifest.checkpoints]
    return next(
        (path for path in [*reversed(own), *reversed(checkpoints(output_dir))] if not missing_part(path)), None
    )


def what_is_left(output_dir: Path) -> str:
    """Sentences that say what a run leaves if it stops now, and how to go on."""
    if (newest := newest_complete(output_dir)) is not None:
        return f"The newest complete checkpoint is {newest}. {GO_ON}"
    if any((output_dir / BEST).rglob("*.safetensors")):
        return (
            f"There is no checkpoint yet, but the best heads so far are in {output_dir / BEST}. To start again, set "
            "--training.overwrite_output_dir true."
        )
    return NOTHING_SAVED


def missing_part(checkpoint: Path) -> str | None:
    """Words for the first thing that is wrong with a checkpoint, by its manifest; None if it is complete."""
    sizes = read_json(checkpoint / MANIFEST).get("files")
    if not isinstance(sizes, dict) or STATE_FILE not in sizes:
        return f"it has no readable {MANIFEST}"
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found:,} of {size:,} bytes"
    return None


def claim(output_dir: Path, checkpoint: Path) -> None:
    """Enters a checkpoint into the run's manifest, as the newest, just before it is written."""
    manifest = Manifest.read(output_dir) or Manifest()
    manifest.checkpoints = [*(name for name in manifest.checkpoints if name != checkpoint.name), checkpoint.name]
    manifest.write(output_dir)


def drop_old(output_dir: Path, keep: int | None, but_aside: bool = False) -> None:
    """
    Deletes the older checkpoints of a run.

    Args:
        output_dir (`Path`): The run's folder.
        keep (`int`, *optional*): How many of the newest checkpoints stay; all if None.
        but_aside (`bool`, defaults to `False`): Whether to delete nothing while a renamed checkpoint exists.
    """
    manifest = Manifest.read(output_dir)
    if keep is None or manifest is None:
        return
    own = [name for name in manifest.checkpoints if (output_dir / name).is_dir()]
    if but_aside and not all(map(_CHECKPOINT.fullmatch, own)):
        return
    for name in own[:-keep]:
        delete(output_dir / name)
    if manifest.checkpoints != own[-keep:]:
        manifest.checkpoints = own[-keep:]
        manifest.write(output_dir)


def delete(checkpoint: Path) -> None:
    """
    Deletes a checkpoint. Files that somebody else has put into its folder move to a folder beside it. A link is
    deleted, but not its target. A printed line says both.
    """
    if checkpoint.is_symlink():
        say(f"The link {str(checkpoint)!r} is deleted; its target {str(checkpoint.resolve())!r} stays.")
        remove(checkpoint)
        return
    own = read_json(checkpoint / MANIFEST).get("files")
    files = [path for path in checkpoint.rglob("*") if path.is_symlink() or path.is_file()]
    own = {checkpoint / name for name in (*own, MANIFEST)} if isinstance(own, dict) else set(files)
    if others := [path for path in files if path not in own]:
        kept = checkpoint.with_name(f"kept-from-{checkpoint.name}")
        while kept.exists():
            kept = kept.with_name(f"{kept.name}-again")
        for path in others:
            place = kept / path.relative_to(checkpoint)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        say(f"{str(checkpoint)!r} is deleted. Files in it that no run has written are kept in {str(kept)!r}.")
    remove(checkpoint)


def put_aside(output_dir: Path, manifest: Manifest, checkpoint: Path) -> None:
    """
    Renames the checkpoints after the one that a run goes on from, so that the run can write its own. Enters the new
    names into the manifest, with the checkpoint to go on from as the newest.

    Args:
        output_dir (`Path`): The run's folder.
        manifest ([`Manifest`]): The run's manifest.
        checkpoint (`Path`): The checkpoint to go on from, in the folder.
    """
    step, when = step_of(checkpoint), time.strftime("%Y%m%dT%H%M%S")
    own = [name for name in manifest.checkpoints if (output_dir / name).exists() and name != checkpoint.name]
    later = [name for name in own if _CHECKPOINT.fullmatch(name) and step_of(Path(name)) > step]
    aside = {name: f"{name}.before-{when}" for name in later}
    rest = [name for name in own if name not in later]
    # Both old and new names, since a kill may come before the renaming.
    manifest.checkpoints = [*later, *aside.values(), *rest, checkpoint.name]
    manifest.write(output_dir)
    for old, new in aside.items():
        os.replace(output_dir / old, output_dir / new)
    if aside:
        say(
            f"This run goes on from {str(checkpoint)!r}. Later checkpoints are renamed: "
            f"{', '.join(f'{old} to {new}' for old, new in aside.items())}. training.save_total_limit may delete them."
        )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """
    Loads the state of a run from a checkpoint, without the states of its heads.

    Raises:
        `InputError`: if the checkpoint does not exist, is incomplete, or comes from another version of this package.
    """
    if not checkpoint.is_dir():
        raise InputError(f"There is no checkpoint folder {str(checkpoint)!r}. Name a folder such as checkpoint-1000.")
    if wrong := missing_part(checkpoint):
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} is incomplete: {wrong}. Resume from another one, or set "
            "--training.resume_from_checkpoint true for the newest complete one."
        )
    state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} was written by another version of sae_accel. Go on with that version, or "
            "start a new run in another training.output_dir. --training.init_from can take the checkpoint's heads."
        )
    return state


@contextmanager
def damage_told(checkpoint: Path) -> Iterator[None]:
    """
    While open, a checkpoint's files are read, which may be damaged.

    Raises:
        `InputError`: in place of the error that a damaged file causes in its reader.
    """
    try:
        yield
    except Exception as error:
        # An error of memory or of another process is no sign of damage, and has a message of its own.
        if isinstance(error, (InputError, RunEnded, dist.DistError)) or is_out_of_memory(error):
            raise
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} cannot be read, so its files may be damaged ({type(error).__name__}: "
            f"{one_line(error)[:200]}). Resume from another checkpoint, or start a new run."
        ) from error


def random_state() -> dict[str, Any]:
    """Returns the state of all random generators of this process, in types that load without running code."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets all random generators of this process to a result of `random_state`."""
    random.setstate(state["python"])
    np.random.set_state((state["numpy"][0], np.array(state["numpy"][1], dtype=np.uint32), *state["numpy"][2:]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])

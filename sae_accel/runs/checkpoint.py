"""The checkpoints of a run: which there are, which is the newest, and the state that one holds."""

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


GO_ON = "Go on with --training.resume_from_checkpoint true."
STATE_FILE = "training_state.pt"
# Of what is in it; raised whenever that changes, so that no run goes on from what it would misread.
FORMAT = 3
# The second of them is one that a run has put aside, as it went on from an older one.
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ANY_CHECKPOINT = re.compile(r"checkpoint-(\d+)(\.before-.*)?")


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders with the names of checkpoints, by their steps."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint holds, by its name or what is in it."""
    if match := _ANY_CHECKPOINT.fullmatch(checkpoint.name):
        return int(match[1])
    step = read_json(checkpoint / TRAINER_STATE).get("global_step")
    return step if isinstance(step, int) else 0


def newest_complete(output_dir: Path) -> Path | None:
    """
    The whole checkpoint of a run that was written last, or None. Where no run has written down what it owns, the one
    with the most steps.
    """
    manifest = Manifest.read(output_dir)
    own = [] if manifest is None else [output_dir / name for name in manifest.checkpoints]
    return next(
        (path for path in [*reversed(own), *reversed(checkpoints(output_dir))] if not missing_part(path)), None
    )


def what_is_left(output_dir: Path) -> str:
    """What a run that is stopped now leaves, and how to go on, in words."""
    if (newest := newest_complete(output_dir)) is not None:
        return f"The newest whole checkpoint is {newest}. {GO_ON}"
    if any((output_dir / BEST).rglob("*.safetensors")):
        return (
            f"There is no checkpoint yet, and the best heads so far are in {output_dir / BEST}. Start again with "
            "--training.overwrite_output_dir true."
        )
    return NOTHING_SAVED


def missing_part(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, by its manifest; None if it is whole."""
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
    """Writes down that a checkpoint is about to be written, as the newest of its run."""
    manifest = Manifest.read(output_dir) or Manifest()
    manifest.checkpoints = [*(name for name in manifest.checkpoints if name != checkpoint.name), checkpoint.name]
    manifest.write(output_dir)


def drop_old(output_dir: Path, keep: int | None, but_aside: bool = False) -> None:
    """
    Deletes the older checkpoints of a run.

    Args:
        output_dir (`Path`): The run's folder.
        keep (`int`, *optional*): How many of those that were written last stay; all if None.
        but_aside (`bool`, defaults to `False`): Delete nothing while there is one that was put aside.
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
    Deletes a checkpoint. What else somebody has put into its folder is kept beside, and told; of a link what it leads
    to stays, and that is told too.
    """
    if checkpoint.is_symlink():
        say(f"{str(checkpoint)!r} was a link, and is deleted. What it led to, {str(checkpoint.resolve())!r}, stays.")
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
        say(f"{str(checkpoint)!r} is deleted. What no run has left in it is kept in {str(kept)!r}.")
    remove(checkpoint)


def put_aside(output_dir: Path, manifest: Manifest, checkpoint: Path) -> None:
    """
    Gives other names to a run's checkpoints that come after the one that it goes on from, so that it can write its
    own, and makes that one the newest. Writes the manifest.

    Args:
        output_dir (`Path`): The run's folder.
        manifest ([`Manifest`]): What the run owns.
        checkpoint (`Path`): The one to go on from, in the folder.
    """
    step, when = step_of(checkpoint), time.strftime("%Y%m%dT%H%M%S")
    own = [name for name in manifest.checkpoints if (output_dir / name).exists() and name != checkpoint.name]
    later = [name for name in own if _CHECKPOINT.fullmatch(name) and step_of(Path(name)) > step]
    aside = {name: f"{name}.before-{when}" for name in later}
    rest = [name for name in own if name not in later]
    # Both names, since a kill may come between the two.
    manifest.checkpoints = [*later, *aside.values(), *rest, checkpoint.name]
    manifest.write(output_dir)
    for old, new in aside.items():
        os.replace(output_dir / old, output_dir / new)
    if aside:
        say(
            f"Goes on from {str(checkpoint)!r}. What was written after it is put aside: "
            f"{', '.join(f'{old} as {new}' for old, new in aside.items())}. Only training.save_total_limit deletes it."
        )


def load_state(checkpoint: Path) -> dict[str, Any]:
    """
    The run's state in a checkpoint, without that of heads.

    Raises:
        `InputError`: if the checkpoint does not exist, is not whole, or is of another version of this package.
    """
    if not checkpoint.is_dir():
        raise InputError(f"There is no checkpoint folder {str(checkpoint)!r}. Name a folder such as checkpoint-1000.")
    if wrong := missing_part(checkpoint):
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} is not whole: {wrong}. Resume from another one, or set "
            "training.resume_from_checkpoint: true for the newest that is whole."
        )
    state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} was written by another version of sae_accel. Go on with that version, or "
            "start anew in another training.output_dir; its heads load as ever, and training.init_from takes them."
        )
    return state


@contextmanager
def damage_told(checkpoint: Path) -> Iterator[None]:
    """
    What is read of a checkpoint's files, which may be damaged.

    Raises:
        `InputError`: in the place of what a damaged file makes its reader run into.
    """
    try:
        yield
    except Exception as error:
        # Memory and other processes fail in other ways, and say so.
        if isinstance(error, (InputError, RunEnded, dist.DistError)) or is_out_of_memory(error):
            raise
        raise InputError(
            f"Checkpoint {str(checkpoint)!r} cannot be read, so its files may be damaged ({type(error).__name__}: "
            f"{one_line(error)[:200]}). Go on from another, or start anew."
        ) from error


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

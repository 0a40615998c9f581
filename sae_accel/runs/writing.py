"""
How files reach the disk: complete or not at all, and with the same outcome on every process.

A checkpoint is written into a hidden folder beside its place. Only when every process has written its part, and the
files are safe on the disk, does the folder get its final name. If one process cannot write, all raise the same error.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor

from ..common.errors import NotSaved, one_line
from ..common.files import free_bytes, in_units, remove, write_json
from ..common.quiet import quiet_files
from ..common.run_files import MANIFEST
from ..common.staging import staging_folder
from ..models import HeadModel
from ..processes.agreement import gather_objects


WEIGHTS = "model.safetensors"


class Writing:
    """
    Runs the writes of one process. After a failed write it skips the later ones, but the process still takes part in
    the collectives that the others wait for.
    """

    def __init__(self) -> None:
        self.error: str | None = None

    def __call__(self, work: Callable[[], object]) -> None:
        """Runs `work`, which writes, unless an earlier write failed."""
        if self.error is not None:
            return
        try:
            work()
        except (OSError, SafetensorError) as error:
            self.error = one_line(error)

    def failed_anywhere(self) -> str | None:
        """The error of the first process that could not write; None if all could. Every process must call it."""
        return next((error for error in gather_objects(self.error) if error is not None), None)


@contextmanager
def written_together(what: Path, needed: int = 0) -> Iterator[Writing]:
    """
    While open, every process writes; at the end all raise the same error if one could not.

    Args:
        what (`Path`): The file or folder that is written, for the message.
        needed (`int`, defaults to 0): Its number of bytes, for the message; 0 if unknown.

    Raises:
        `NotSaved`: on every process, if one could not write.
    """
    write = Writing()
    yield write
    if (reason := write.failed_anywhere()) is not None:
        takes = f"It takes {in_units(needed)}, and " if needed else ""
        with suppress(OSError):
            reason += f". {takes}{in_units(free_bytes(what))} are free there"
        raise NotSaved(f"{str(what)!r} could not be saved: {reason}.")


def save_head(head: HeadModel, weights: Mapping[str, Tensor], folder: Path, process_index: int = 0) -> None:
    """
    Writes `config.json` and `model.safetensors` of a head; after a kill each file is complete or absent.

    Args:
        head (`HeadModel`): The head.
        weights (`Mapping[str, torch.Tensor]`): The head's whole parameters, by name.
        folder (`Path`): The folder to write into; it is made if it does not exist.
        process_index (`int`, defaults to 0): The index of the process that writes.
    """
    # A link may lead to another disk. Files can be moved only within a disk, so write beside the target.
    folder = folder.resolve()
    with staging_folder(folder, f"saving-{process_index}") as staging:
        with quiet_files():
            head.save_pretrained(staging, state_dict=dict(weights))
        folder.mkdir(parents=True, exist_ok=True)
        for file in staging.iterdir():
            os.replace(file, folder / file.name)


def save_state(state: Any, file: Path) -> None:
    """
    Writes a state with `torch.save`.

    Raises:
        `OSError`: if the state cannot be written; torch itself raises a `RuntimeError`.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise OSError(f"{str(file)!r} cannot be written: {one_line(error)}") from error


@contextmanager
def staged(folder: Path, process: PartialState, needed: int = 0) -> Iterator[tuple[Path, Writing]]:
    """
    Makes a hidden folder into which all processes write, and renames it to `folder` once everything is written. So
    `folder` is complete, absent or unchanged. A manifest with the size of each file is added.

    Args:
        folder (`Path`): The final folder, on a disk that every process shares.
        process (`PartialState`): This process.
        needed (`int`, defaults to 0): The folder's number of bytes; 0 if unknown.

    Raises:
        `NotSaved`: on every process, if one could not write.
    """
    staging = folder.with_name(f".{folder.name}.partial")
    try:
        with written_together(folder, needed) as write:
            if process.is_main_process:
                write(lambda: _make_empty(staging))
        with written_together(folder, needed) as write:
            yield staging, write
        with written_together(folder, needed) as write:
            if process.is_main_process:
                write(lambda: _put_in_place(staging, folder))
    except NotSaved:
        if process.is_main_process:
            with suppress(OSError):
                remove(staging)
        raise


def _make_empty(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _put_in_place(staging: Path, folder: Path) -> None:
    """Writes the manifest, waits until all files are safe on the disk, and renames the folder to its final name."""
    sizes = {}
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        _sync(file)
        sizes[str(file.relative_to(staging))] = file.stat().st_size
    write_json(staging / MANIFEST, {"files": sizes})
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    if folder.exists() or folder.is_symlink():
        os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    _sync(folder.parent)
    remove(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""How files reach the disk: whole or not at all, and on every process alike."""

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
    Writes what one process has to write. Once something could not be written nothing more is tried, but the process
    goes on to take part in what others need of it.
    """

    def __init__(self) -> None:
        self.error: str | None = None

    def __call__(self, work: Callable[[], object]) -> None:
        """Does `work`, which writes."""
        if self.error is not None:
            return
        try:
            work()
        except (OSError, SafetensorError) as error:
            self.error = one_line(error)

    def failed_anywhere(self) -> str | None:
        """Why the first process that could not write could not; None if all could. Every process has to ask."""
        return next((error for error in gather_objects(self.error) if error is not None), None)


@contextmanager
def written_together(what: Path, needed: int = 0) -> Iterator[Writing]:
    """
    What is written while this is open is written on every process, or all hear of the first failure.

    Args:
        what (`Path`): What is being written, for the message.
        needed (`int`, defaults to 0): Bytes that it takes, for the message; 0 if that is not known.

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
    Writes `config.json` and `model.safetensors` of a head, each file complete or absent.

    Args:
        head (`HeadModel`): What it is.
        weights (`Mapping[str, torch.Tensor]`): Its parameters, whole.
        folder (`Path`): Where; made if it does not exist.
        process_index (`int`, defaults to 0): Which process writes.
    """
    # A link may lead to another disk, to which nothing can be moved from beside the link.
    folder = folder.resolve()
    with staging_folder(folder, f"saving-{process_index}") as staging:
        with quiet_files():
            head.save_pretrained(staging, state_dict=dict(weights))
        folder.mkdir(parents=True, exist_ok=True)
        for file in staging.iterdir():
            os.replace(file, folder / file.name)


def save_state(state: Any, file: Path) -> None:
    """
    Writes a state by `torch.save`.

    Raises:
        `OSError`: if it cannot be written; torch itself raises a `RuntimeError` without the reason.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise OSError(f"{str(file)!r} cannot be written: {one_line(error)}") from error


@contextmanager
def staged(folder: Path, process: PartialState, needed: int = 0) -> Iterator[tuple[Path, Writing]]:
    """
    A folder for all processes to write into that takes the name `folder` once all is written, so that `folder` is
    complete, absent or as it was before. A manifest with the size of each file goes with it.

    Args:
        folder (`Path`): Where every process sees the same.
        process (`PartialState`): This one.
        needed (`int`, defaults to 0): Bytes that it takes, if that is known.

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
    """Moves a folder that is written to where it belongs, when its content is safe on the disk."""
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

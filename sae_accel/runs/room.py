"""Checks that a run can write into its output folder, and that the disk has room for its checkpoints."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import InputError, one_line
from ..common.files import free_bytes, in_units


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """
    Makes a folder, with its parents. Folders that it made and that are still empty at the end are removed again.

    Raises:
        `InputError`: if the folder cannot be made.
    """
    dangling = next((path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()), None)
    if dangling is not None:
        raise InputError(
            f"training.output_dir: {str(dangling)!r} is a link to {os.readlink(dangling)!r}, which does not exist. "
            "Make the target folder, or set another training.output_dir."
        )
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            if not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turns an `OSError` about a folder that cannot be written to into an `InputError` of one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"training.output_dir: {str(folder)!r} cannot be written to: {one_line(error)}. Set another "
            "training.output_dir."
        ) from error


def check_writable(folder: Path, places: Iterable[str]) -> None:
    """
    Checks that a run can write, with a temporary file in the output folder and in each existing folder of `places`.

    Args:
        folder (`Path`): The output folder.
        places (`Iterable[str]`): The folders below it into which the run will write.

    Raises:
        `InputError`: if a folder cannot be written to.
    """
    with made(folder):
        for path in (folder, *(folder / place for place in places)):
            if path.is_dir():
                with write_errors(path), tempfile.TemporaryFile(dir=path) as file:
                    file.write(b"0")


def check_room(folder: Path, checkpoint: int, heads: int, keep: int | None, freed: int = 0, held: int = 0) -> str:
    """
    Checks that the disk has room for a first checkpoint and the final heads.

    Args:
        folder (`Path`): The output folder, which need not exist.
        checkpoint (`int`): Bytes of a checkpoint.
        heads (`int`): Bytes of the final heads.
        keep (`int`, *optional*): The number of checkpoints that stay (`save_total_limit`); all if None.
        freed (`int`, defaults to 0): Bytes that the run deletes first.
        held (`int`, defaults to 0): Bytes of checkpoints that the run already owns.

    Returns:
        `str`: a sentence with the needed and the free disk space.

    Raises:
        `InputError`: if a checkpoint and the heads do not fit.
    """
    free = free_bytes(folder) + freed
    if checkpoint + heads > free:
        raise InputError(
            f"training.output_dir: a checkpoint takes {in_units(checkpoint)} and the heads {in_units(heads)}, but "
            f"only {in_units(free)} are free in {str(folder)!r}. Make room, or set another training.output_dir."
        )
    fits = (free + held - heads) // checkpoint
    once = " after the earlier run is deleted" if freed else ""
    takes = f"A checkpoint takes {in_units(checkpoint)}; {in_units(free)} are free in {str(folder)!r}{once}"
    # One more than `keep` must fit, because old checkpoints are deleted only after a new one is written.
    if keep is None:
        few = f", enough for {fits}. The run keeps all; --training.save_total_limit 2 keeps two" if fits < 1000 else ""
        return f"{takes}{few}."
    if keep + 1 > fits:
        advice = f"Set it to {fits - 1}, or make room" if fits > 1 else "Make room"
        return f"{takes}, not enough for training.save_total_limit = {keep} and one more during a save. {advice}."
    return f"{takes}, enough for the {keep} that the run keeps."

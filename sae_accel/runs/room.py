"""Whether a run can write where it is to write, and whether there is room for what it will keep."""

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
    While open, a folder is there. Whatever had to be made for it, and is still empty at the end, goes again.

    Raises:
        `InputError`: if it cannot be made.
    """
    dangling = next((path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()), None)
    if dangling is not None:
        raise InputError(
            f"training.output_dir: {str(dangling)!r} is a link to {os.readlink(dangling)!r}, which does not exist. "
            "Make that folder, or set another."
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
    """Gives the reason for a folder that cannot be written to in one line."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"training.output_dir: {str(folder)!r} cannot be written to: {one_line(error)}. Set another."
        ) from error


def check_writable(folder: Path, places: Iterable[str]) -> None:
    """
    Writes a file into a run's folder, and into each folder below it that is there already, and deletes it again.

    Args:
        folder (`Path`): The output folder.
        places (`Iterable[str]`): Folders below it into which the run will write.

    Raises:
        `InputError`: if one cannot be written to.
    """
    with made(folder):
        for path in (folder, *(folder / place for place in places)):
            if path.is_dir():
                with write_errors(path), tempfile.TemporaryFile(dir=path) as file:
                    file.write(b"0")


def check_room(folder: Path, checkpoint: int, heads: int, keep: int | None, freed: int = 0, held: int = 0) -> str:
    """
    Checks that there is room for a first checkpoint.

    Args:
        folder (`Path`): The output folder, which need not exist.
        checkpoint (`int`): Bytes of a checkpoint.
        heads (`int`): Bytes of the heads as they are saved at the end.
        keep (`int`, *optional*): Checkpoints that are kept; all if None.
        freed (`int`, defaults to 0): Bytes that the run deletes first.
        held (`int`, defaults to 0): Bytes of checkpoints that are there, and that it keeps or deletes as its own.

    Returns:
        `str`: how much will be needed and how much there is, in words.

    Raises:
        `InputError`: if there is no room for it and the heads.
    """
    free = free_bytes(folder) + freed
    if checkpoint + heads > free:
        raise InputError(
            f"training.output_dir: a checkpoint takes {in_units(checkpoint)} and the heads {in_units(heads)}, but "
            f"{in_units(free)} are free in {str(folder)!r}. Make room, or set another."
        )
    fits = (free + held - heads) // checkpoint
    once = " once what is there is deleted" if freed else ""
    takes = f"A checkpoint takes {in_units(checkpoint)}; {in_units(free)} are free in {str(folder)!r}{once}"
    # While one is written those that are kept are there too.
    if keep is None:
        few = f", enough for {fits}. All are kept: training.save_total_limit keeps fewer" if fits < 1000 else ""
        return f"{takes}{few}."
    if keep + 1 > fits:
        advice = f"Set it to {fits - 1}, or make room" if fits > 1 else "Make room"
        return f"{takes}, not enough for training.save_total_limit = {keep} and the one that is written. {advice}."
    return f"{takes}, enough for the {keep} that are kept."

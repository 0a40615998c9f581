import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .signals import signals


@contextmanager
def staging_folder(target: Path, suffix: str = "partial") -> Iterator[Path]:
    """
    A path beside `target` to write into, so that what is whole can be moved there at once. Whatever is left at it goes
    in the end.

    Args:
        target (`Path`): Where the files are to be.
        suffix (`str`, defaults to `"partial"`): Tells this folder from those of others that write there.
    """
    staging = target.with_name(f".{target.name}.{suffix}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with signals.undone(lambda: shutil.rmtree(staging, ignore_errors=True)):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)

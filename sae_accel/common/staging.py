import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .signals import signals


@contextmanager
def staging_folder(target: Path, suffix: str = "partial") -> Iterator[Path]:
    """
    Yields a path beside `target` to write into, so that the caller can move finished files to `target` in one step.
    Files that are still at the path in the end are deleted.

    Args:
        target (`Path`): The final place of the files.
        suffix (`str`, defaults to `"partial"`): Distinguishes this folder from the staging folders of other writers.
    """
    staging = target.with_name(f".{target.name}.{suffix}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with signals.undone(lambda: shutil.rmtree(staging, ignore_errors=True)):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)

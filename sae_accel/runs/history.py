import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.run_files import HISTORY


# The number of latest logs in memory, for callbacks that look back.
KEPT_IN_MEMORY = 100


class LogHistory:
    """
    The logged values of a run, in one file. Each log adds a line of JSON, so that neither checkpoints nor memory grow
    with the number of steps.

    Args:
        folder (`Path`): The run's folder.
    """

    def __init__(self, folder: Path):
        self.file = folder / HISTORY

    def begin(self, step: int, source: Path) -> list[dict[str, Any]]:
        """
        Starts the file with the logs up to the step at which the run begins, and drops later ones.

        Args:
            step (`int`): The number of optimizer steps done before.
            source (`Path`): The folder of the run whose checkpoint this run goes on from, or this run's folder.

        Returns:
            `list[dict[str, Any]]`: the latest logs that are kept.
        """
        latest: deque[dict[str, Any]] = deque(maxlen=KEPT_IN_MEMORY)
        staging = self.file.with_name(f".{self.file.name}.partial")
        staging.parent.mkdir(parents=True, exist_ok=True)
        with open(staging, "w", encoding="utf-8") as file:
            for entry in entries(source / HISTORY):
                if entry.get("step", 0) > step:
                    break
                file.write(json.dumps(entry) + "\n")
                latest.append(entry)
        os.replace(staging, self.file)
        return list(latest)

    def append(self, entry: dict[str, Any]) -> None:
        """Adds one log."""
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError:
            # On a full disk a part of the line may have been written: remove it.
            with suppress(OSError):
                os.truncate(self.file, size)
            raise


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the logs of a file in order, without a line that a kill cut off; none if there is no file."""
    if not file.is_file():
        return
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            with suppress(ValueError):
                if isinstance(entry := json.loads(line), dict):
                    yield entry

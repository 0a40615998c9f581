import json
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.run_files import HISTORY


# Logs that a trainer holds, for callbacks that look back.
KEPT_IN_MEMORY = 100


class LogHistory:
    """
    What a run has logged, in one file to which each log adds a line of JSON, so that neither a checkpoint nor memory
    grows with the steps of a run.

    Args:
        folder (`Path`): The run's folder.
    """

    def __init__(self, folder: Path):
        self.file = folder / HISTORY

    def begin(self, step: int, source: Path) -> list[dict[str, Any]]:
        """
        Drops what was logged after the step at which the run begins.

        Args:
            step (`int`): Optimizer steps that were done before.
            source (`Path`): Folder of the run from whose checkpoint this one goes on, or its own.

        Returns:
            `list[dict[str, Any]]`: the latest of what is kept.
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
            # Of a disk that fills, part of a line may have been written.
            with suppress(OSError):
                os.truncate(self.file, size)
            raise


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """What was logged, in order, but for a line that a kill has cut off; nothing if there is no file."""
    if not file.is_file():
        return
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            with suppress(ValueError):
                if isinstance(entry := json.loads(line), dict):
                    yield entry

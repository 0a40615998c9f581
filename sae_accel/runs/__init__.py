"""A run's output folder: its lock, its owner, its checkpoints, and the message at the end of a run."""

from .checkpoint import newest_complete
from .output_folder import OutputFolder


__all__ = ["OutputFolder", "newest_complete"]

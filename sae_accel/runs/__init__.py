"""A run's folder on disk: what an earlier run left in it, checkpoints, and the message that a run ends with."""

from .checkpoint import newest_complete
from .output_folder import OutputFolder


__all__ = ["OutputFolder", "newest_complete"]

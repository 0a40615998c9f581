"""The memory plan of `--dry-run`: the run's own code runs on tensors without memory, and its bytes are counted."""

from .launch import Launch
from .memory import plan_memory, show_plan


__all__ = ["Launch", "plan_memory", "show_plan"]

"""What a run will need before it starts (`--dry-run`): its own code runs on tensors without memory."""

from .launch import Launch
from .memory import plan_memory, show_plan


__all__ = ["Launch", "plan_memory", "show_plan"]

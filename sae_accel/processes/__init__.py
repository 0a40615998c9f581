"""
What the processes of one run owe each other: agreement, one order, and word of a death. And their `Accelerator`.
"""

from .agreement import first_on_node, gather_objects, gather_to_main, raise_together, this_process
from .watch import Watch


__all__ = ["Watch", "first_on_node", "gather_objects", "gather_to_main", "raise_together", "this_process"]

"""
The processes of one run: how they agree, wait for each other and notice that one died. And their `Accelerator`.
"""

from .agreement import first_on_node, gather_objects, gather_to_main, raise_together, this_process
from .watch import Watch


__all__ = ["Watch", "first_on_node", "gather_objects", "gather_to_main", "raise_together", "this_process"]

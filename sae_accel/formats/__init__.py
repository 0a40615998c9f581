"""
The formats room: reads the heads of other libraries.

Each module knows the files of one library. Its `find` names the heads among the files of a folder or repo, from the
files' names alone; its `open_head` gives a head's config and a function that reads its tensors under our names.
"""

from .foreign import ForeignHead
from .layouts import LAYOUTS
from .place import Place


__all__ = ["LAYOUTS", "ForeignHead", "Place"]

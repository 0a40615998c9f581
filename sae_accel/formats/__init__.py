"""Other libraries' files: each module finds heads among the files of a folder or repo, and reads them."""

from .foreign import ForeignHead
from .layouts import LAYOUTS
from .place import Place


__all__ = ["LAYOUTS", "ForeignHead", "Place"]

"""
The loading room: a folder, a file or a repo on the Hub comes in, and heads by name go out.

`repository` lists and fetches files, `find` names the heads among them, and `head_files` reads one head. `auto` and
`sae_heads` are the public interface.
"""

from .auto import AutoSae
from .repository import Repository
from .sae_heads import HeadNotFound, SaeHeads


__all__ = ["AutoSae", "HeadNotFound", "Repository", "SaeHeads"]

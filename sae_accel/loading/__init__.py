"""Where trained heads come from. A folder, a file or a repo on the Hub comes in; heads by name go out."""

from .auto import AutoSae
from .repository import Repository
from .sae_heads import HeadNotFound, SaeHeads


__all__ = ["AutoSae", "HeadNotFound", "Repository", "SaeHeads"]

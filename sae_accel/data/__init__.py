"""Where tokens come from. A recipe's `data` comes in; batches of token ids go out, the same on every run."""

from .batches import Batches, Position
from .tokens import chunk_and_tokenize, load_tokens


__all__ = ["Batches", "Position", "chunk_and_tokenize", "load_tokens"]

"""
The data room: a recipe's `data` comes in, and batches of token ids go out.

The batches are the same on every run with the same recipe. Texts become sequences in `cutting` and `tokens`, and the
processes share the sequences in `batches`.
"""

from .batches import Batches, Position
from .tokens import chunk_and_tokenize, load_tokens


__all__ = ["Batches", "Position", "chunk_and_tokenize", "load_tokens"]

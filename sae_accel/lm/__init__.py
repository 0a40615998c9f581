"""
The frozen language model. A recipe's `model` comes in; an LM goes out, with ways to read, replace and measure what its
modules give.
"""

from .hooks import Site
from .load import load_architecture, load_lm, load_tokenizer


__all__ = ["Site", "load_architecture", "load_lm", "load_tokenizer"]

"""
The frozen language model. A recipe's `model` section comes in; an LM goes out, with functions that read, replace and
measure the outputs of its modules.
"""

from .hooks import Site
from .load import load_architecture, load_lm, load_tokenizer


__all__ = ["Site", "load_architecture", "load_lm", "load_tokenizer"]

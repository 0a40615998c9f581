"""
Recipes: what a user asks for. A YAML file or the words of a command line come in; a checked `Recipe` goes out, before
any model is read.
"""

from .arguments import DataArguments, HeadArguments, LoraArguments, ModelArguments, SaeTrainingArguments
from .recipe import Recipe, load_recipe


__all__ = [
    "DataArguments",
    "HeadArguments",
    "LoraArguments",
    "ModelArguments",
    "Recipe",
    "SaeTrainingArguments",
    "load_recipe",
]

"""Training: a recipe, an LM and data come in, trained heads go out."""

from .trainer import SaeTrainer


__all__ = ["SaeTrainer"]

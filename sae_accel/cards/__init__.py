"""What a run's folder tells a reader: its model card and plots, made from the files in it."""

from .model_card import write_card


__all__ = ["write_card"]

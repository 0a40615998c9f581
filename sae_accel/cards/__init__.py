"""Model cards and plots. A run's folder comes in; a `README.md` and images for its readers go out."""

from .model_card import write_card


__all__ = ["write_card"]

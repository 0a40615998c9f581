"""Whole heads on every process: a single process, or several with DDP."""

from .base import Spread


class Replicated(Spread):
    """Every process holds every head, and trains it on its own tokens: a single process, or DDP."""

from .base import Spread


class Replicated(Spread):
    """Every process holds every head, and trains it on tokens of its own: one process alone, or DDP."""

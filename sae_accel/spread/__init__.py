"""
Strategies that spread the heads of a run over its processes: one class per strategy, and the choice between them.
"""

from .base import Spread
from .choose import spread_heads


__all__ = ["Spread", "spread_heads"]

"""How the heads of a run are spread over its processes: one class for each way, and the choice between them."""

from .base import Spread
from .choose import spread_heads


__all__ = ["Spread", "spread_heads"]

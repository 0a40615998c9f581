"""The optimizer of all heads: its parameter groups, its schedule, signum, muon, and the hooks around its step."""

from .build import bring_to, build_optimizer, build_scheduler, default_learning_rate
from .muon import MuonWithAdam
from .signum import Signum


__all__ = ["MuonWithAdam", "Signum", "bring_to", "build_optimizer", "build_scheduler", "default_learning_rate"]

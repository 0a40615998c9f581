"""
The one optimizer of all heads: its parameter groups and its schedule, signum and muon, and what happens to gradients
in its step.
"""

from .build import build_optimizer, build_scheduler, default_learning_rate
from .muon import MuonWithAdam
from .signum import Signum


__all__ = ["MuonWithAdam", "Signum", "build_optimizer", "build_scheduler", "default_learning_rate"]

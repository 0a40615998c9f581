"""
The activations that heads train on. Batches of tokens come in; activations by site go out, of this process's tokens or
of the tokens of all processes.
"""

from .exchanged import ExchangedActivations
from .running_lm import ActivationSource, RunningLM
from .trained_rows import Activations


__all__ = ["ActivationSource", "Activations", "ExchangedActivations", "RunningLM"]

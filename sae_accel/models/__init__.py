"""
Heads: their configs, and the computation from activations of an LM to latents, reconstructions and losses.

Nothing here knows an LM, a file format or other processes.
"""

from .configuration_head import HeadConfig
from .configuration_sae import SaeConfig
from .configuration_transcoder import TranscoderConfig
from .latent_slice import LatentSlice
from .modeling_head import HeadModel
from .modeling_sae import SaeModel
from .modeling_transcoder import TranscoderModel
from .outputs import HeadOutput, Latents
from .pretrained_head import BY_LATENT
from .registry import register


__all__ = [
    "BY_LATENT",
    "HeadConfig",
    "HeadModel",
    "HeadOutput",
    "LatentSlice",
    "Latents",
    "SaeConfig",
    "SaeModel",
    "TranscoderConfig",
    "TranscoderModel",
    "register",
]

from transformers import AutoConfig, AutoModel

from .configuration_head import HeadConfig
from .configuration_sae import SaeConfig
from .configuration_transcoder import TranscoderConfig
from .latent_slice import LatentSlice
from .modeling_head import BY_LATENT, HeadModel
from .modeling_sae import SaeModel
from .modeling_transcoder import TranscoderModel
from .outputs import HeadOutput, Latents


for _config, _model in ((SaeConfig, SaeModel), (TranscoderConfig, TranscoderModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)

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
]

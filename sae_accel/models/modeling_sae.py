import torch
from torch import Tensor

from .configuration_sae import SaeConfig
from .modeling_head import HeadModel


class SaeModel(HeadModel):
    """
    A sparse autoencoder: it reads an activation and reconstructs it through at most k latents per token. See
    arXiv:2406.04093.

    With `x` of shape `(..., d_in)`: `pre = W_enc (x - b_dec) + b_enc`, and `y_hat = sum_i acts_i W_dec[i] + b_dec`
    over the selected latents.

    Args:
        config ([`SaeConfig`]): Widths, k and activation. The weights start at random.

    Examples:
        ```python
        from sae_accel import SaeConfig, SaeModel

        sae = SaeModel(SaeConfig(d_in=576, expansion_factor=8, k=32))
        top_acts, top_indices = sae.encode(torch.randn(2, 10, 576))
        sae(torch.randn(2, 10, 576)).fvu
        ```
    """

    config: SaeConfig

    def __init__(self, config: SaeConfig):
        super().__init__(config)
        self.post_init()

    def _initial_decoder(self) -> Tensor:
        return torch.nn.functional.normalize(self.encoder.weight, dim=-1)

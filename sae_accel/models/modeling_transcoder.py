from .configuration_transcoder import TranscoderConfig
from .modeling_head import HeadModel


class TranscoderModel(HeadModel):
    """
    A transcoder: it reads one activation and predicts another, such as an MLP's output from its input, through at most
    k latents per token. See arXiv:2406.11944.

    With `x` of shape `(..., d_in)`: `pre = W_enc x + b_enc`, and `y_hat = sum_i acts_i W_dec[i] + b_dec (+ W_skip x)`
    over the selected latents, of shape `(..., d_out)`.

    Args:
        config ([`TranscoderConfig`]): Widths, k, activation and skip connection. The weights start at random.

    Examples:
        ```python
        from sae_accel import TranscoderConfig, TranscoderModel

        transcoder = TranscoderModel(TranscoderConfig(d_in=576, skip_connection=True, k=32))
        mlp_input, mlp_output = torch.randn(2, 10, 576), torch.randn(2, 10, 576)
        transcoder(mlp_input, mlp_output).fvu
        ```
    """

    config: TranscoderConfig

    def __init__(self, config: TranscoderConfig):
        super().__init__(config)
        self.post_init()

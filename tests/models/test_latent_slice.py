import pytest
import torch

from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel
from sae_accel.models.latent_slice import LatentSlice


WIDTHS = {"d_in": 12, "num_latents": 40, "k": 3}
CONFIGS = {
    "jumprelu": SaeConfig(activation="jumprelu", **WIDTHS),
    "gated": SaeConfig(activation="gated", **WIDTHS),
    "transcoder": TranscoderConfig(d_out=8, skip_connection=True, **WIDTHS),
}
BY_LATENT = {"encoder.weight", "encoder.bias", "W_dec", "threshold", "b_mag", "r_mag"}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_head_that_keeps_a_slice_lets_go_of_all_other_latents(config):
    head = (SaeModel if isinstance(config, SaeConfig) else TranscoderModel)(config)
    whole = {name: torch.randn_like(tensor) for name, tensor in head.state_dict().items()}
    head.load_whole(whole)
    head.keep_latents(LatentSlice([0, 10, 30, 40], 1))
    assert head.num_latents == 20
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter, whole[name][10:30] if name in BY_LATENT else whole[name])
        # A view of the whole would keep the memory of what others hold.
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    head.load_whole({name: tensor + 1 for name, tensor in whole.items()})
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter, (whole[name][10:30] if name in BY_LATENT else whole[name]) + 1)

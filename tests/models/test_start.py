"""Where the parameters of a new head lie before it trains."""

import pytest
import torch

from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


D_IN, D_OUT, NUM_LATENTS = 10, 12, 40


def make_sae(**options):
    return SaeModel(SaeConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=3, **options))


def make_transcoder(**options):
    return TranscoderModel(TranscoderConfig(d_in=D_IN, d_out=D_OUT, num_latents=NUM_LATENTS, k=3, **options))


@pytest.fixture
def dirty_memory():
    """What is not filled by anyone is NaN, instead of what happened to lie there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("make_head", [make_sae, lambda **options: make_transcoder(skip_connection=True, **options)])
def test_all_but_the_weights_of_an_sae_start_at_zero(make_head, activation, dirty_memory):
    assert torch.empty(3).isnan().all(), "a weak test"
    head = make_head(activation=activation)
    tensors = head.state_dict()
    encoder = tensors.pop("encoder.weight")
    assert 0 < encoder.abs().max() <= D_IN**-0.5
    if head.config.d_in == head.config.d_out:
        torch.testing.assert_close(tensors.pop("W_dec"), torch.nn.functional.normalize(encoder))
    assert all((tensor == 0).all() for tensor in tensors.values())


@pytest.mark.parametrize("make_head", [make_sae, lambda: make_sae(apply_b_dec_to_input=False), make_transcoder])
def test_biases_centre_pre_activations_on_the_mean_input_and_reconstructions_on_the_mean_target(make_head):
    head = make_head().double()
    read, target = torch.randn(D_IN).double() + 1, torch.randn(head.config.d_out).double() + 2
    head.initialize_biases(read, target)
    assert torch.equal(head.b_dec, target)
    shift = head.b_dec if head.config.apply_b_dec_to_input else 0
    pre = head.encoder.weight @ (read - shift) + head.encoder.bias
    torch.testing.assert_close(pre, torch.zeros_like(pre))
    assert head.encoder.bias.abs().max() > 0.1, "a weak test"

import pytest
import torch

from sae_accel.models import Latents, SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


def test_latents_become_dense_where_they_belong():
    latents = Latents(torch.tensor([[3.0, 2.0], [5.0, 0.0]]), torch.tensor([[4, 1], [0, 0]]))
    # Of the second token's columns the last is filled up, and names a latent that is active.
    assert latents.to_dense(6).tolist() == [[0, 2, 0, 0, 3, 0], [5, 0, 0, 0, 0, 0]]
    several = Latents(latents.top_acts.view(1, 2, 2), latents.top_indices.view(1, 2, 2)).to_dense(6)
    assert several.shape == (1, 2, 6) and torch.equal(several[0], latents.to_dense(6))


def test_dense_latents_times_the_decoder_are_the_reconstruction():
    torch.manual_seed(0)
    sae = SaeModel(SaeConfig(d_in=12, num_latents=40, k=3)).double()
    x = torch.randn(5, 7, 12, dtype=torch.float64)
    latents = sae.encode(x)
    expected = latents.to_dense(sae.num_latents) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae.decode(latents), expected)
    assert torch.equal(sae.decode(latents), sae.decode(*latents))


def test_a_skip_connection_takes_latents_and_what_was_read():
    transcoder = TranscoderModel(TranscoderConfig(d_in=12, num_latents=40, k=3, skip_connection=True))
    torch.nn.init.normal_(transcoder.W_skip)
    x = torch.randn(5, 12)
    latents = transcoder.encode(x)
    assert torch.equal(transcoder.decode(latents, activations=x), transcoder.decode(*latents, x))
    with pytest.raises(ValueError, match="activations is missing: the head has a skip connection"):
        transcoder.decode(latents)
    with pytest.raises(ValueError, match="top_indices is missing: decode needs the indices"):
        transcoder.decode(latents.top_acts)


def test_a_heads_repr_says_what_it_is():
    sae = SaeModel(SaeConfig(d_in=12, num_latents=1200, k=3, hookpoint="layers.1"))
    assert repr(sae) == (
        "SaeModel(SAE at layers.1, topk, k=3, encoder 12 -> 1,200, decoder 1,200 -> 12, torch.float32)"
    )
    config = TranscoderConfig(d_in=12, d_out=8, num_latents=40, k=None, activation="relu", encoder_only=True)
    assert repr(TranscoderModel(config)) == (
        "TranscoderModel(transcoder, relu, encoder 12 -> 40, no decoder, torch.float32)"
    )


@pytest.mark.parametrize(
    "config",
    [
        SaeConfig(d_in=12, num_latents=50, k=3),
        TranscoderConfig(d_in=12, d_out=8, num_latents=50, k=3),
        TranscoderConfig(d_in=12, d_out=8, num_latents=50, k=3, skip_connection=True),
    ],
    ids=["sae", "transcoder", "skip connection"],
)
def test_a_config_counts_the_weights_of_its_head(config):
    head = (SaeModel if isinstance(config, SaeConfig) else TranscoderModel)(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in head.parameters())

"""Numbers against the peer, eai-sparsify, with the same weights in both."""

import os

import pytest
import torch

from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


# The peer takes Triton wherever it is installed, also for tensors on a CPU, and reads this when it is imported.
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
sparsify = pytest.importorskip("sparsify", reason="The oracle eai-sparsify is not installed.")

KINDS = {
    "topk SAE": (SaeModel, SaeConfig, {}, {}),
    "groupmax SAE": (SaeModel, SaeConfig, {"activation": "groupmax"}, {}),
    "transcoder": (TranscoderModel, TranscoderConfig, {}, {"transcode": True}),
    "skip transcoder": (TranscoderModel, TranscoderConfig, {"skip_connection": True}, {"transcode": True}),
}
# d, num_latents, k, leading dimensions.
SIZES = [(64, 256, 8, (50,)), (24, 96, 4, (3, 37)), (17, 85, 5, (2, 3, 8)), (48, 1536, 32, (96,))]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def make_pair(kind, d, num_latents, k, **peer_options):
    """Our head and the peer's, with the same weights, none of them zero."""
    model_class, config_class, options, for_peer = KINDS[kind]
    ours = model_class(config_class(d_in=d, num_latents=num_latents, k=k, **options))
    peer = sparsify.SparseCoder(
        d, sparsify.SparseCoderConfig(num_latents=num_latents, k=k, **options, **for_peer, **peer_options)
    )
    generator = torch.Generator().manual_seed(d + num_latents + k)
    weights = {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in ours.state_dict().items()}
    # Above zero, so that every selected latent is active: at zero the peer's gradient is another, see below.
    weights["encoder.bias"] = weights["encoder.bias"].abs() + 4
    ours.load_state_dict(weights)
    peer.load_state_dict(weights)
    return ours, peer


def make_data(kind, d, leading):
    """Skewed activations with a mean, and a target."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.randn(d, generator=generator).exp()
    x = torch.randn(*leading, d, generator=generator) * scale + torch.randn(d, generator=generator)
    if "SAE" in kind:
        return x, x
    return x, x.flip(-1).tanh() + 0.1 * torch.randn(*leading, d, generator=generator)


def relative_error(ours, peers):
    return ((ours - peers).norm() / peers.norm()).item()


def by_latent(acts, indices, num_latents):
    """Activations as a dense row for each token, whatever their order."""
    acts, indices = acts.flatten(0, -2), indices.flatten(0, -2)
    return torch.zeros(len(acts), num_latents).scatter(-1, indices, acts.detach())


@every_kind
@every_size
def test_encode_and_decode_agree_with_the_peer(kind, size):
    d, num_latents, k, leading = size
    ours, peer = make_pair(kind, d, num_latents, k)
    x, _ = make_data(kind, d, leading)
    acts, indices = ours.encode(x)
    assert acts.shape == indices.shape == (*leading, k)
    peer_acts, peer_indices, _ = peer.encode(x.flatten(0, -2))
    dense, peer_dense = by_latent(acts, indices, num_latents), by_latent(peer_acts, peer_indices, num_latents)
    assert torch.equal(dense > 0, peer_dense > 0)
    assert relative_error(dense, peer_dense) < 1e-5

    decoded = ours.decode(acts, indices, x).flatten(0, -2)
    expected = peer.decode(peer_acts, peer_indices)
    if peer.W_skip is not None:
        expected = expected + x.flatten(0, -2) @ peer.W_skip.T
    assert relative_error(decoded, expected) < 1e-5


@every_kind
@every_size
def test_fvu_and_residual_agree_with_the_peer(kind, size):
    d, num_latents, k, leading = size
    ours, peer = make_pair(kind, d, num_latents, k)
    x, y = make_data(kind, d, leading)
    output, expected = ours(x, y), peer(x.flatten(0, -2), y.flatten(0, -2))
    assert output.reconstruction.shape == y.shape
    assert abs(output.fvu / expected.fvu - 1) < 1e-5
    residual, peer_residual = (y - output.reconstruction).flatten(0, -2), y.flatten(0, -2) - expected.sae_out
    assert relative_error(residual, peer_residual) < 1e-5
    # Rounding may turn the sign of a residual that is next to nothing, and of no other.
    turned = residual.sign() != peer_residual.sign()
    assert (peer_residual[turned].abs() < 1e-5 * peer_residual.abs().max()).all()


@every_kind
@every_size
def test_gradients_of_every_parameter_and_of_the_input_agree_with_the_peer(kind, size):
    d, num_latents, k, leading = size
    ours, peer = make_pair(kind, d, num_latents, k)
    x, y = make_data(kind, d, leading)
    x, peer_x = x.clone().requires_grad_(), x.flatten(0, -2).clone().requires_grad_()
    output = ours(x, None if "SAE" in kind else y)
    expected = peer(peer_x, None if "SAE" in kind else y.flatten(0, -2))
    assert (expected.latent_acts > 0).all(), "the peer's gradients are wrong where a selected activation is zero"
    output.loss.backward()
    expected.fvu.backward()
    peers = dict(peer.named_parameters())
    assert set(peers) == set(dict(ours.named_parameters()))
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, peers[name].grad) < 1e-5, name
    assert relative_error(x.grad.flatten(0, -2), peer_x.grad) < 1e-5


def test_selected_latents_at_zero_get_no_gradient_though_the_peer_gives_them_one():
    ours, peer = make_pair("topk SAE", 24, 96, 8)
    for head in (ours, peer):
        head.encoder.bias.data.fill_(-100)
        head.encoder.bias.data[:3] = 100
    x, _ = make_data("topk SAE", 24, (50,))
    output, expected = ours(x), peer(x)
    assert (output.top_acts > 0).sum() == 3 * 50 and output.top_acts.shape == (50, 8)
    output.loss.backward()
    expected.fvu.backward()
    for grad, peer_grad in (
        (ours.encoder.weight.grad, peer.encoder.weight.grad),
        (ours.encoder.bias.grad, peer.encoder.bias.grad),
    ):
        assert relative_error(grad[:3], peer_grad[:3]) < 1e-5
        assert (grad[3:] == 0).all()
        assert (peer_grad[3:] != 0).any()


@every_size
@pytest.mark.parametrize("num_dead", [1, 9, 60])
def test_auxk_agrees_with_the_peer_except_that_it_reaches_the_encoder(size, num_dead):
    d, num_latents, k, leading = size
    ours, peer = make_pair("topk SAE", d, num_latents, k)
    x, _ = make_data("topk SAE", d, (*leading,))
    dead_mask = torch.zeros(num_latents, dtype=torch.bool)
    dead_mask[torch.randperm(num_latents, generator=torch.Generator().manual_seed(1))[:num_dead]] = True
    loss = ours(x, dead_mask=dead_mask).auxk_loss
    expected = peer(x.flatten(0, -2), dead_mask=dead_mask).auxk_loss
    assert abs(loss / expected - 1) < 1e-5
    loss.backward()
    expected.backward()
    assert relative_error(ours.W_dec.grad, peer.W_dec.grad) < 1e-5
    for grad, peer_grad in (
        (ours.encoder.weight.grad, peer.encoder.weight.grad),
        (ours.encoder.bias.grad, peer.encoder.bias.grad),
    ):
        assert (grad[dead_mask] != 0).any()
        assert (peer_grad == 0).all()


@every_size
@pytest.mark.parametrize("kind", ["topk SAE", "transcoder"])
def test_multi_topk_agrees_with_the_peer_except_that_it_reaches_the_encoder(kind, size):
    d, num_latents, k, leading = size
    ours, peer = make_pair(kind, d, num_latents, k, multi_topk=True)
    x, y = make_data(kind, d, leading)
    output = ours(x, y, multi_topk=True)
    expected = peer(x.flatten(0, -2), y.flatten(0, -2))
    assert abs(output.multi_topk_fvu / expected.multi_topk_fvu - 1) < 1e-5
    output.multi_topk_fvu.backward()
    expected.multi_topk_fvu.backward()
    assert relative_error(ours.W_dec.grad, peer.W_dec.grad) < 1e-5
    for grad, peer_grad in (
        (ours.encoder.weight.grad, peer.encoder.weight.grad),
        (ours.encoder.bias.grad, peer.encoder.bias.grad),
    ):
        assert (grad != 0).any()
        assert (peer_grad == 0).all()


def test_multi_topk_keeps_k_latents_and_the_skip_connection_which_the_peer_does_not():
    ours, peer = make_pair("skip transcoder", 24, 96, 4, multi_topk=True)
    x, y = make_data("skip transcoder", 24, (50,))
    output, expected = ours(x, y, multi_topk=True), peer(x, y)
    assert output.top_acts.shape == (50, 4) and expected.latent_acts.shape == (50, 16)
    skipped = x @ peer.W_skip.T
    corrected = (expected.sae_out + skipped - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    assert abs(output.multi_topk_fvu / corrected - 1) < 1e-5

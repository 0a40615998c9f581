import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


D_IN, D_OUT, NUM_LATENTS, K, TOKENS = 10, 12, 40, 3, 20


def make_sae(dtype=torch.float64, **options):
    return _randomize(SaeModel(SaeConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, **options)), dtype)


def make_transcoder(dtype=torch.float64, skip_connection=True):
    config = TranscoderConfig(d_in=D_IN, d_out=D_OUT, num_latents=NUM_LATENTS, k=K, skip_connection=skip_connection)
    return _randomize(TranscoderModel(config), dtype)


def _randomize(head, dtype):
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return head.to(dtype)


def make_data(head, leading=(TOKENS,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, D_IN, generator=generator, dtype=torch.float64)
    if head.config.d_out == D_IN:
        return x, x
    return x, torch.randn(*leading, D_OUT, generator=generator, dtype=torch.float64) + 1


def make_dead_mask(num_dead):
    mask = torch.zeros(NUM_LATENTS, dtype=torch.bool)
    mask[torch.randperm(NUM_LATENTS, generator=torch.Generator().manual_seed(2))[:num_dead]] = True
    return mask


def reference_losses(head, x, y, dead_mask):
    """FVU, AuxK and Multi-TopK by dense products, for a head with `topk`."""
    pre = (x - (head.b_dec if head.config.apply_b_dec_to_input else 0)) @ head.encoder.weight.T + head.encoder.bias
    skip = x @ head.W_skip.T if head.W_skip is not None else 0

    def decode(top):
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu()) @ head.W_dec

    variance = (y - y.mean(0)).pow(2).sum()
    residual = y - decode(pre.topk(K)) - head.b_dec - skip
    wide_residual = y - decode(pre.topk(4 * K)) - head.b_dec - skip
    k_aux, num_dead = head.config.d_out // 2, int(dead_mask.sum())
    estimate = decode(pre.masked_fill(~dead_mask, -torch.inf).topk(min(k_aux, num_dead)))
    auxk = min(1, num_dead / k_aux) * (residual.detach() - estimate).pow(2).sum()
    errors = {"fvu": residual.pow(2).sum(), "auxk_loss": auxk, "multi_topk_fvu": wide_residual.pow(2).sum()}
    return {name: error / variance for name, error in errors.items()}


def gradients(loss, head):
    parameters = dict(head.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def assert_same(found, expected):
    """Equal in float64, but for AuxK's scale, which is a float32."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make_head", [make_sae, make_transcoder, lambda: make_transcoder(skip_connection=False)])
@pytest.mark.parametrize("num_dead", [0, 4, 6, 30])
def test_losses_and_all_their_gradients_are_those_of_the_dense_reference(make_head, num_dead):
    head = make_head()
    x, y = make_data(head)
    dead_mask = make_dead_mask(num_dead)
    output = head(x, y, dead_mask=dead_mask, auxk_alpha=0.3, multi_topk=True)
    expected = reference_losses(head, x, y, dead_mask)
    expected["loss"] = expected["fvu"] + 0.3 * expected["auxk_loss"] + expected["multi_topk_fvu"] / 8
    for name, loss in expected.items():
        assert_same(output[name], loss)
        assert_same(gradients(output[name], head), gradients(loss, head))


@pytest.mark.parametrize("make_head", [make_sae, make_transcoder])
def test_multi_topk_passes_gradcheck_in_every_parameter(make_head):
    head = make_head()
    x, y = make_data(head, (6,))
    names = [name for name, _ in head.named_parameters()]

    def loss(*parameters):
        changed = dict(zip(names, parameters, strict=True))
        return functional_call(head, changed, (x, y), {"multi_topk": True}).multi_topk_fvu

    assert gradcheck(loss, tuple(head.parameters()), fast_mode=True)


@pytest.mark.parametrize("make_head", [make_sae, make_transcoder])
@pytest.mark.parametrize("num_dead", [3, 9])
def test_auxk_passes_gradcheck_in_the_dead_latents(make_head, num_dead):
    head = make_head()
    x, y = make_data(head, (6,))
    dead_mask = make_dead_mask(num_dead)
    # Never among the k largest, so that the residual, through which no gradient flows, does not depend on them.
    head.encoder.bias.data[~dead_mask] += 20

    def loss(weight, bias, decoder):
        changed = {
            "encoder.weight": head.encoder.weight.detach().index_put((dead_mask,), weight),
            "encoder.bias": head.encoder.bias.detach().index_put((dead_mask,), bias),
            "W_dec": head.W_dec.detach().index_put((dead_mask,), decoder),
        }
        return functional_call(head, changed, (x, y), {"dead_mask": dead_mask}).auxk_loss

    rows = (head.encoder.weight, head.encoder.bias, head.W_dec)
    inputs = tuple(parameter.detach()[dead_mask].requires_grad_() for parameter in rows)
    assert gradcheck(loss, inputs, fast_mode=True)


def test_auxk_of_a_target_of_one_dimension_takes_the_foremost_dead_latent():
    config = TranscoderConfig(d_in=D_IN, d_out=1, num_latents=NUM_LATENTS, k=K)
    head = _randomize(TranscoderModel(config), torch.float64)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, dead_mask = x[:, :1] + 1, make_dead_mask(4)
    pre = (x @ head.encoder.weight.T + head.encoder.bias).masked_fill(~dead_mask, -torch.inf)
    best = pre.max(-1)
    estimate = best.values.relu()[:, None] * head.W_dec[best.indices]
    output = head(x, y, dead_mask=dead_mask)
    error = (y - output.reconstruction - estimate).pow(2).sum()
    assert_same(output.auxk_loss, error / (y - y.mean(0)).pow(2).sum())


def test_dead_latent_gets_gradient_from_auxk():
    head = make_sae()
    x, y = make_data(head)
    dead_mask = make_dead_mask(4)
    head.encoder.bias.data = torch.where(dead_mask, 0.0, 50.0).double()
    without = gradients(head(x, y).loss, head)
    having = gradients(head(x, y, dead_mask=dead_mask).loss, head)
    for name in ("encoder.weight", "encoder.bias", "W_dec"):
        before, after = without[name].view(NUM_LATENTS, -1), having[name].view(NUM_LATENTS, -1)
        assert (before[dead_mask] == 0).all(), name
        assert (after[dead_mask] != 0).any(-1).all(), name


def test_auxk_moves_dead_latents_towards_the_residual():
    head = make_transcoder()
    x, y = make_data(head)
    dead_mask = make_dead_mask(4)
    head.W_dec.data[dead_mask] = 0
    output = head(x, y, dead_mask=dead_mask)
    residual = (y - output.reconstruction).detach()
    step = -gradients(output.auxk_loss, head)["W_dec"]
    pre_activations = head.encoder(x)[:, dead_mask].relu()
    assert ((pre_activations @ step[dead_mask]) * residual).sum() > 0


def test_the_residual_of_auxk_is_detached():
    head = make_transcoder()
    x, y = make_data(head)
    dead_mask = make_dead_mask(4)
    grads = gradients(head(x, y, dead_mask=dead_mask).auxk_loss, head)
    assert (grads["b_dec"] == 0).all() and (grads["W_skip"] == 0).all()
    for name in ("encoder.weight", "encoder.bias", "W_dec"):
        assert (grads[name][~dead_mask] == 0).all(), name
        assert (grads[name][dead_mask] != 0).any(), name


def test_auxk_without_a_dead_latent_is_zero():
    head = make_sae()
    x, _ = make_data(head)
    output = head(x, dead_mask=make_dead_mask(0))
    assert output.auxk_loss == 0 and output.loss == output.fvu
    assert all((grad == 0).all() for grad in gradients(output.auxk_loss, head).values())


def test_auxk_leaves_the_selected_latents_as_they_are():
    head = make_sae()
    x, _ = make_data(head)
    plain, output = head(x), head(x, dead_mask=make_dead_mask(30))
    for name in ("top_acts", "top_indices", "reconstruction", "fvu"):
        assert torch.equal(plain[name], output[name]), name


def test_multi_topk_leaves_k_selected_latents():
    head = make_transcoder()
    x, y = make_data(head)
    plain, output = head(x, y), head(x, y, multi_topk=True)
    assert output.top_acts.shape == output.top_indices.shape == (TOKENS, K)
    for name in ("top_acts", "top_indices", "reconstruction", "fvu"):
        torch.testing.assert_close(plain[name], output[name], rtol=1e-14, atol=0)
    assert torch.equal(plain.top_indices, head.encode(x).top_indices)


def test_multi_topk_reconstruction_includes_the_skip_connection():
    head = make_transcoder()
    x, _ = make_data(head)
    # With no latents and no bias, the skip connection alone is the target.
    head.W_dec.data.zero_()
    head.b_dec.data.zero_()
    assert head(x, x @ head.W_skip.T, multi_topk=True).multi_topk_fvu < 1e-24


@pytest.mark.parametrize("options", [{"activation": "groupmax", "num_latents": 39}, {"k": 11}])
def test_multi_topk_that_does_not_fit_the_head_raises(options):
    head = SaeModel(SaeConfig(**{"d_in": D_IN, "num_latents": NUM_LATENTS, "k": K} | options))
    with pytest.raises(ValueError, match="multi_topk selects"):
        head(torch.randn(4, D_IN), multi_topk=True)


@pytest.mark.parametrize("make_head", [make_sae, make_transcoder])
def test_parts_of_a_batch_with_its_variance_add_up_to_the_whole(make_head):
    head = make_head()
    x, y = make_data(head)
    options = {"dead_mask": make_dead_mask(4), "multi_topk": True, "total_variance": (y - y.mean(0)).pow(2).sum()}
    whole = head(x, y, **options | {"total_variance": None})
    parts = [head(x[rows], y[rows], **options) for rows in torch.arange(TOKENS).split((7, 12, 1))]
    for name in ("loss", "fvu", "auxk_loss", "multi_topk_fvu"):
        total = torch.stack([part[name] for part in parts]).sum()
        assert_same(total, whole[name])
        assert_same(gradients(total, head), gradients(whole[name], head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_target_without_variance_gives_finite_losses_and_gradients(dtype, tokens):
    head = make_sae(dtype)
    x = torch.ones(tokens, D_IN)
    output = head(x, dead_mask=make_dead_mask(4), multi_topk=True)
    output.loss.backward()
    assert output.loss.isfinite() and output.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("make_head", [make_sae, make_transcoder])
def test_a_batch_without_tokens_gives_zero_losses_and_gradients(make_head):
    head = make_head()
    x, y = make_data(head, (0,))
    output = head(x, y, dead_mask=make_dead_mask(4), multi_topk=True)
    assert output.loss == 0 and output.top_acts.shape == (0, K)
    assert all((grad == 0).all() for grad in gradients(output.loss, head).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_overflow_no_sum(dtype):
    head = make_sae(torch.float32)
    x = (make_data(head, (512,))[0] * 300 + 1000).to(dtype)
    assert (x - x.mean(0)).pow(2).sum().item() != pytest.approx(total := _variance(x), rel=1e-4), "a weak test"
    dead_mask = make_dead_mask(30)
    output = head(x, dead_mask=dead_mask, multi_topk=True)
    wide = make_sae(torch.float64)
    expected = reference_losses(wide, x.double(), x.double(), dead_mask)
    assert total > torch.finfo(torch.float16).max
    for name, loss in expected.items():
        assert output[name].item() == pytest.approx(loss.item(), rel=1e-4), name
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() and (parameter.grad != 0).any() for parameter in head.parameters())


def _variance(x):
    return (x.double() - x.double().mean(0)).pow(2).sum().item()


def test_a_half_precision_target_is_measured_in_float32():
    head = make_transcoder(torch.float32)
    x, y = make_data(head, (512,))
    y = (y * 300).to(torch.float16)
    fvu = head(x, y).fvu
    expected = reference_losses(make_transcoder(), x, y.double(), make_dead_mask(0))["fvu"]
    assert fvu.dtype == torch.float32
    assert fvu.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("make_head", [make_sae, make_transcoder])
def test_leading_dimensions_are_kept(make_head, leading):
    head = make_head()
    x, y = make_data(head, leading)
    acts, indices = head.encode(x)
    assert acts.shape == indices.shape == (*leading, K)
    flat = head.encode(x.reshape(-1, D_IN))
    assert torch.equal(indices.reshape(-1, K), flat.top_indices)
    torch.testing.assert_close(acts.reshape(-1, K), flat.top_acts)
    assert head.decode(acts, indices, x).shape == (*leading, head.config.d_out)
    output = head(x, y, dead_mask=make_dead_mask(4), multi_topk=True)
    assert output.reconstruction.shape == (*leading, head.config.d_out)
    assert output.top_acts.shape == output.top_indices.shape == (*leading, K)
    torch.testing.assert_close(output.reconstruction, head.decode(acts, indices, x))


def test_activations_of_another_width_raise():
    with pytest.raises(ValueError, match="shape .4, 11., but its last dimension must be d_in = 10"):
        make_sae().encode(torch.randn(4, D_IN + 1))

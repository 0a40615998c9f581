"""Each activation against its paper's formula, on dense tensors in float64."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import assert_equal, tiny_tokens, tiny_trainer, weights, whole_and_resumed
from torch.nn.functional import relu
from transformers import TrainerCallback

from sae_accel import HeadArguments, SaeTrainingArguments
from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel
from sae_accel.models.latent_selection import topk
from sae_accel.ops import sparse
from sae_accel.recipe.checks import check_entry, check_objective


D, M, K, N = 12, 40, 3, 50


@pytest.fixture
def x():
    return torch.randn(5, 10, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _head(activation: str, **kwargs) -> SaeModel:
    torch.manual_seed(0)
    head = SaeModel(SaeConfig(d_in=D, num_latents=M, k=K, activation=activation, **kwargs)).double()
    with torch.no_grad():
        for name, tensor in head.state_dict(keep_vars=True).items():
            tensor.normal_(std=0.3)
            if name == "threshold":
                tensor.abs_()
    return head.eval()


def _pre(head: SaeModel, x: torch.Tensor) -> torch.Tensor:
    return (x - head.b_dec) @ head.encoder.weight.T + head.encoder.bias


def _dense(head: SaeModel, x: torch.Tensor) -> torch.Tensor:
    """Activations of all latents by the papers' formulas."""
    pre = _pre(head, x)
    match head.config.activation:
        case "relu":
            return relu(pre)
        case "jumprelu" | "batchtopk":
            return pre * (pre > head.threshold)
        case "signed_topk":
            largest = pre.abs().topk(K, dim=-1).values[..., -1:]
            return pre * (pre.abs() >= largest)
        case "gated":
            gate = (x - head.b_dec) @ head.encoder.weight.T
            return (pre > 0) * relu(gate * head.r_mag.exp() + head.b_mag)


def _scattered(head: SaeModel, x: torch.Tensor) -> torch.Tensor:
    acts, indices = head.encode(x)
    return x.new_zeros(*x.shape[:-1], M).scatter_add_(-1, indices, acts)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk", "gated"])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_latents_and_reconstruction_are_the_papers(activation, in_pieces, x, monkeypatch):
    if in_pieces:
        monkeypatch.setattr(sparse, "MAX_PRE_ACTIVATIONS", 7 * M)
    head = _head(activation)
    dense = _dense(head, x)
    assert len(set((dense > 0).sum(-1).flatten().tolist())) > 3
    torch.testing.assert_close(_scattered(head, x), dense, rtol=1e-12, atol=1e-12)
    expected = dense @ head.W_dec + head.b_dec
    torch.testing.assert_close(head(x).reconstruction, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.decode(*head.encode(x)), expected, rtol=1e-12, atol=1e-12)


def test_signed_topk_keeps_the_largest_by_magnitude_with_their_sign(x):
    head = _head("signed_topk")
    dense = _dense(head, x)
    assert (dense < 0).any() and (dense > 0).any()
    torch.testing.assert_close(_scattered(head, x), dense)
    torch.testing.assert_close(head(x).reconstruction, dense @ head.W_dec + head.b_dec)


def test_topk_of_fewer_latents_than_k_gives_each_of_them_and_then_nothing():
    pre_activations = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, 5.0]])
    values, indices = topk(pre_activations, 5)
    nothing = [-math.inf] * 2
    assert values.tolist() == [[3, 2, 1, *nothing], [5, -1, -3, *nothing]]
    assert indices[:, :3].tolist() == [[1, 2, 0], [2, 0, 1]] and indices.max() < 3


@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_gradients_are_those_of_the_dense_formula(activation, x):
    head = _head(activation)
    weights = torch.randn(D, dtype=x.dtype)
    (head(x).reconstruction @ weights).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    ((_dense(head, x) @ head.W_dec + head.b_dec) @ weights).sum().backward()
    for name, parameter in head.named_parameters():
        if activation != "gated" or name != "encoder.bias":
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert all(grad.isfinite().all() for grad in found.values())


def test_no_tokens_and_no_active_latent_are_no_error(x):
    head = _head("jumprelu")
    assert head.encode(x[:0]).top_acts.shape[0] == 0
    head.threshold.data.fill_(1e9)
    assert head.encode(x).top_acts.abs().sum() == 0
    torch.testing.assert_close(head(x).reconstruction, head.b_dec.expand_as(x))


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])
def test_input_is_normalised_and_the_reconstruction_brought_back(norm, x):
    head = _head("topk", normalize_input=norm)
    x = 5 * x + 2
    if norm == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        normal, back = (x - mean) / (std + 1e-5), lambda y: y * std + mean
    else:
        scale = math.sqrt(D) / x.norm(dim=-1, keepdim=True)
        normal, back = x * scale, lambda y: y / scale
    values, indices = relu(_pre(head, normal)).topk(K)
    dense = torch.zeros(*x.shape[:-1], M, dtype=x.dtype).scatter(-1, indices, values)
    expected = back(dense @ head.W_dec + head.b_dec)
    torch.testing.assert_close(head(x).reconstruction, expected)
    torch.testing.assert_close(head.decode(*head.encode(x), x), expected)
    with pytest.raises(ValueError, match="normalises its input"):
        head.decode(*head.encode(x))


def _training_loss(head: SaeModel, x: torch.Tensor, weight: float) -> torch.Tensor:
    output = head(x, sparsity_weight=weight)
    output.loss.backward()
    return output


def test_jumprelu_has_the_gradient_of_the_paper(x):
    """arXiv:2407.14435: -(theta / eps) K((z - theta) / eps) of the activation, -(1 / eps) K of the step."""
    head, weight = _head("jumprelu", bandwidth=0.5).train(), 0.7
    output = _training_loss(head, x, weight)
    tokens = x.reshape(-1, D)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}
    theta = parameters["threshold"]
    pre = (tokens - parameters["b_dec"]) @ parameters["encoder.weight"].T + parameters["encoder.bias"]
    active = (pre > theta).double().detach()
    width = (0.5 * theta).detach()
    kernel = (((pre - theta) / width).abs() < 0.5).double().detach()
    assert 0 < kernel.sum() and (kernel * (1 - active)).sum() > 0
    acts = pre * active - (theta / width).detach() * kernel * (theta - theta.detach())
    steps = active - kernel / width * (theta - theta.detach())
    fvu = (tokens - acts @ parameters["W_dec"] - parameters["b_dec"]).pow(2).sum()
    fvu = fvu / (tokens - tokens.mean(0)).pow(2).sum()
    sparsity = (steps.sum(-1).mean() / K - 1) ** 2
    (fvu + weight * sparsity).backward()
    torch.testing.assert_close(output.sparsity_loss.double(), sparsity.detach(), rtol=1e-6, atol=0)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-5, atol=1e-8)


def test_batchtopk_trains_on_the_largest_of_the_batch(x):
    head = _head("batchtopk").train()
    dense = relu(_pre(head, x)).reshape(-1, M)
    least = dense.flatten().topk(K * N).values[-1]
    expected = dense * (dense >= least)
    assert (expected > 0).sum() == K * N
    output = head(x)
    torch.testing.assert_close(_scattered(head, x).reshape(-1, M), expected)
    torch.testing.assert_close(output.smallest_act.double(), least)
    # It is summed up over a step, which must not hold on to the step's graphs.
    assert not output.smallest_act.requires_grad
    expected_output = expected @ head.W_dec + head.b_dec
    torch.testing.assert_close(output.reconstruction.reshape(-1, D), expected_output)


def test_batchtopk_lets_no_token_take_more_than_eight_times_k(x):
    head = _head("batchtopk").train()
    head.config.k = 1
    x[0, 0] *= 1e4
    # Its active latents are all larger than those of any other token.
    assert (relu(_pre(head, x))[0, 0] > 0).sum() > 8 == (head.encode(x).top_acts[0, 0] > 0).sum()


def test_auxk_reaches_dead_latents_of_the_new_activations(x):
    for activation in ("batchtopk", "jumprelu"):
        head = _head(activation).train()
        dead = torch.zeros(M, dtype=torch.bool)
        dead[:8] = True
        with torch.no_grad():
            head.encoder.bias[:8] = -50.0
            head.encoder.bias[0] = 0.2
        residual = x - head(x).reconstruction.detach()
        pre = relu(_pre(head, x))[..., :8].topk(D // 2).values.sum()
        output = head(x, dead_mask=dead)
        estimate = relu(_pre(head, x)) * dead @ head.W_dec
        expected = (residual - estimate).pow(2).sum() / (x.reshape(-1, D) - x.mean((0, 1))).pow(2).sum()
        assert pre > 0
        torch.testing.assert_close(output.auxk_loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_a_run_ends_with_l0_near_k_by_a_threshold(activation, tmp_path):
    entry = HeadArguments(hookpoints="layers.2", activation=activation, k=4, expansion_factor=4, sparsity_weight=1.0)
    held_out = tiny_tokens(16, seed=9)
    options = {"optim": "adam", "learning_rate": 3e-3, "max_steps": 150}
    trainer = tiny_trainer(tmp_path, [entry], held_out=held_out, train=tiny_tokens(256), **options)
    metrics = trainer.train().metrics
    assert 2.5 < metrics["eval/l0/layers.2"] < 6 and metrics["eval/fvu/layers.2"] < 0.8
    sae = AutoSae.from_pretrained(tmp_path)
    assert (sae.threshold > 0).all() and not sae.training
    assert len(sae.threshold.unique()) == (1 if activation == "batchtopk" else 96)


def test_jumprelu_thresholds_begin_where_l0_is_k():
    head = SaeModel(SaeConfig(d_in=D, num_latents=M, k=4, activation="jumprelu")).eval()
    mean = 3 * torch.randn(D)
    x = torch.randn(1000, D) + mean
    with torch.no_grad():
        head.b_dec.copy_(mean)
        head.encoder.bias.normal_(std=0.1)
    head.initialize_threshold(x)
    assert abs((head.encode(x).top_acts > 0).sum(-1).float().mean() - 4) < 0.1


def test_tokens_of_huge_norm_have_no_say_in_where_thresholds_begin():
    head = SaeModel(SaeConfig(d_in=D, num_latents=M, k=4, activation="jumprelu")).eval()
    x = torch.randn(1000, D)
    head.initialize_threshold(x)
    alone = head.threshold.clone()
    # More tokens than may be active for a latent, so that each would be at its threshold.
    more = torch.nn.functional.normalize(torch.randn(200, D), dim=-1) * x.norm(dim=-1).median()
    head.initialize_threshold(torch.cat([x, 4 * more]))
    assert (head.threshold > 1.1 * alone).all()
    for times in (6, 100):
        head.initialize_threshold(torch.cat([x, times * more]))
        torch.testing.assert_close(head.threshold, alone)


def test_no_threshold_begins_below_a_tenth_of_a_usual_pre_activation():
    head = SaeModel(SaeConfig(d_in=D, num_latents=M, k=4, activation="jumprelu")).eval()
    with torch.no_grad():
        head.encoder.bias[:9] = -100.0
    x = torch.randn(1000, D)
    head.initialize_threshold(x)
    usual = head.encoder.weight.norm(dim=-1) * x.norm(dim=-1).median() / math.sqrt(D)
    torch.testing.assert_close(head.threshold[:9], usual[:9] / 10)
    assert (head.threshold[9:] > usual[9:]).all()


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
@pytest.mark.parametrize("optim", ["signum", "adam"])
def test_a_killed_run_goes_on_bit_for_bit(activation, optim, tmp_path):
    entry = HeadArguments(hookpoints="layers.2", activation=activation, k=4, expansion_factor=4, auxk_alpha=0.03)

    def make(folder, callbacks=()):
        return tiny_trainer(folder, [entry], optim=optim, max_steps=8, save_steps=5, callbacks=list(callbacks))

    whole, resumed = whole_and_resumed(tmp_path, make)
    assert_equal(weights(whole), weights(resumed))


def test_evaluation_uses_thresholds_and_training_goes_on_as_before(tmp_path):
    modes = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            modes.append(all(module.training for module in model.modules()))

    entry = HeadArguments(hookpoints="layers.2", activation="batchtopk", k=4, expansion_factor=4)
    options = {"max_steps": 4, "callbacks": [Watch()]}
    often = tiny_trainer(tmp_path / "often", [entry], held_out=tiny_tokens(8, seed=9), eval_steps=1, **options)
    often.train()
    never = tiny_trainer(tmp_path / "never", [entry], max_steps=4)
    never.train()
    assert modes and all(modes)
    assert_equal(weights(often), weights(never))


def test_what_does_not_go_together_is_refused():
    for match, fields in (
        ("k_decay_steps: jumprelu starts", {"activation": "jumprelu", "k_decay_steps": 5}),
        ("sparsity_weight: it needs", {"sparsity_weight": 0.5}),
        ("multi_topk: it needs activation topk", {"activation": "batchtopk", "multi_topk": True}),
    ):
        with pytest.raises(InputError, match=match):
            check_entry(HeadArguments(hookpoints="layers.2", k=4, **fields), "heads[0]")
    with pytest.raises(InputError, match="jumprelu needs a head's own loss to keep L0 at k"):
        check_objective(SaeTrainingArguments(loss="kl"), [HeadArguments(activation="jumprelu")], None)
    with pytest.raises(StrictDataclassError, match="topk selects k latents"):
        SaeConfig(d_in=4, k=None)
    assert TranscoderModel(TranscoderConfig(d_in=4, k=None, activation="relu")).config.k is None

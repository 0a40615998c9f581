import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.sign_sgd import SignSGD
from tiny import Course, tiny_trainer

from sae_accel.bank.parameter_role import ParameterRole
from sae_accel.models.latent_slice import LatentSlice
from sae_accel.ops import rows
from sae_accel.ops.rows import Cut, remove_parallel_
from sae_accel.recipe.arguments import HeadArguments, SaeTrainingArguments
from sae_accel.training.optim import Signum, build_optimizer, build_scheduler, default_learning_rate


def _train(parameter, optimizer, steps):
    target = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    for _ in range(steps):
        (parameter - target).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_signum_is_the_peers_schedule_free_sign_descent():
    torch.manual_seed(0)
    # Over a slice's worth of elements, so that rows are updated in several slices.
    start = torch.randn(700, 400)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    signum = Signum([ours], lr=0.01)
    peer = ScheduleFreeWrapper(SignSGD([theirs], lr=0.01), momentum=0.95)
    peer.train()
    _train(ours, signum, 7), _train(theirs, peer, 7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    peer.eval()
    before = ours.detach().clone()
    with signum.averaged():
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours, before)
    assert torch.equal(ours, before)


def _as_the_docstring_says(start, gradients, rates, momentum=0.95):
    """What `y` and `x` are of a matrix with rows of unit norm, by the plain formulas."""

    def unit(rows):
        return rows / rows.norm(dim=1, keepdim=True)

    x = z = y = start
    total = 0
    for i, (gradient, lr) in enumerate(zip(gradients, rates, strict=True)):
        z = unit(z - lr * gradient.sign())
        weight = max(rates[: i + 1]) ** 2
        total += weight
        x = unit(x + weight / total * (z - x)) if weight else x
        y = momentum * x + (1 - momentum) * z
    return y, x


@pytest.mark.parametrize("is_cut", [False, True], ids=["matrix", "flat piece"])
def test_signum_brings_rows_of_both_iterates_back_to_unit_norm(is_cut, monkeypatch):
    # As of one process, whose sums are those of all.
    monkeypatch.setattr(rows.dist, "all_reduce", lambda sums: None)
    # Two rows of a matrix, and of a flat piece what is not whole rows.
    monkeypatch.setitem(rows.SLICE_ELEMENTS, "cpu", 12)
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(6, 7, 5, generator=generator, dtype=torch.float64)
    start = torch.nn.functional.normalize(start)
    rates = [0.0, 0.2, 0.4, 0.3, 0.1]
    shape = (35,) if is_cut else (7, 5)
    parameter = torch.nn.Parameter(start.clone().view(shape))
    role = ParameterRole(unit_norm=True, cut=Cut(0, 7, 5) if is_cut else None)
    signum = Signum([{"params": [parameter], "role": role}])
    for gradient, lr in zip(gradients, rates, strict=True):
        signum.param_groups[0]["lr"] = lr
        parameter.grad = gradient.clone().view(shape)
        signum.step()
    y, x = _as_the_docstring_says(start, gradients, rates)
    torch.testing.assert_close(parameter.view(7, 5), y)
    with signum.averaged():
        torch.testing.assert_close(parameter.view(7, 5), x)
    torch.testing.assert_close(parameter.view(7, 5), y)


def _first_gradients(folder, **kwargs):
    """By head, the gradient over all its parameters that Adam took in the first step."""
    heads = [
        HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4, normalize_decoder=False),
        HeadArguments(hookpoints="layers.2.mlp", type="transcoder", skip_connection=True, k=4, expansion_factor=4),
    ]
    options = dict(optim="adam", max_steps=1, gradient_accumulation_steps=2) | kwargs
    trainer = tiny_trainer(folder, heads, **options)
    trainer.train()
    moments = trainer.optimizer.state
    return {
        name: torch.cat([moments[parameter]["exp_avg"].flatten() for parameter in head.parameters()]) / 0.1
        for name, head in trainer.heads.items()
    }


def test_each_heads_gradient_is_clipped_by_its_own_norm(tmp_path):
    free = _first_gradients(tmp_path / "free")
    small, large = sorted(free, key=lambda name: free[name].norm())
    bound = (free[small].norm() * free[large].norm()).sqrt().item()
    assert 1.1 * free[small].norm() < bound < free[large].norm() / 1.1, "a weak test"
    clipped = _first_gradients(tmp_path / "clipped", max_grad_norm=bound)
    torch.testing.assert_close(clipped[large], free[large] * bound / free[large].norm())
    assert torch.equal(clipped[small], free[small])


def test_an_optimizer_sees_the_gradient_of_the_whole_window(tmp_path):
    large = _first_gradients(tmp_path / "large", per_device_train_batch_size=8, gradient_accumulation_steps=1)
    # Gradients are taken with the variance of the first batch, here a quarter of the window's.
    parts = _first_gradients(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, gradient in large.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_a_group_of_each_parameter_tells_what_it_is_of_the_whole_head():
    heads = [
        HeadArguments(hookpoints="layers.1", name="jump", k=4, expansion_factor=4, activation="jumprelu"),
        HeadArguments(hookpoints="layers.1", type="transcoder", skip_connection=True, k=4, expansion_factor=4),
    ]
    trainer = tiny_trainer("unused", heads=heads, optim="adam")
    shapes = {
        (name, key): tuple(parameter.shape)
        for name, head in trainer.heads.items()
        for key, parameter in head.named_parameters()
    }
    for head in trainer.heads.values():
        head.keep_latents(LatentSlice([0, 30, head.num_latents], 1))
    groups = build_optimizer(trainer.bank, trainer.args).param_groups
    roles = [group["role"] for group in groups]
    assert {(role.head, role.parameter): role.whole_shape for role in roles} == shapes
    for group, role in zip(groups, roles, strict=True):
        assert group["params"] == [trainer.heads[role.head].get_parameter(role.parameter)]
        assert role.unit_norm == (role.parameter == "W_dec" and trainer.heads[role.head].config.normalize_decoder)
        assert role.relative == (role.parameter == "threshold")
    assert {role.unit_norm for role in roles if role.parameter == "W_dec"} == {True, False}, "a weak test"


@pytest.mark.parametrize(
    ("options", "max_steps", "factors"),
    [
        ({}, 20, {0: 0, 1: 1 / 2, 2: 1, 11: 1 / 2, 20: 0}),
        ({}, 20_000, {500: 1 / 2, 1000: 1}),
        ({"warmup_steps": 0.25}, 8, {1: 1 / 2, 2: 1, 5: 1 / 2, 8: 0}),
        ({"warmup_steps": 4}, 8, {1: 1 / 4, 4: 1, 6: 1 / 2}),
        ({"lr_scheduler_type": "constant"}, 20, {1: 1 / 2, 2: 1, 20: 1}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0}, 20, {0: 1, 20: 1}),
        ({"optim": "signum"}, 20, {0: 1, 1: 1, 20: 1}),
        ({"optim": "signum", "warmup_steps": 4}, 20, {1: 1 / 4, 4: 1, 20: 1}),
    ],
    ids=["tenth", "1000", "part", "steps", "constant", "no warm-up", "signum", "signum with warm-up"],
)
def test_a_learning_rate_rises_and_falls_as_the_arguments_say(options, max_steps, factors):
    arguments = SaeTrainingArguments(output_dir="unused", report_to="none", **({"optim": "adam"} | options))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    scheduler = build_scheduler(optimizer, arguments, max_steps)
    rates = []
    for _ in range(max(factors) + 1):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert {step: rates[step] / 3 for step in factors} == pytest.approx(factors)


@pytest.mark.parametrize("optim", ["adam", "muon", "adam8bit"])
def test_decoder_rows_move_and_stay_at_unit_norm(optim):
    trainer = tiny_trainer("unused", heads=[HeadArguments(layers=[1], k=4)], optim=optim, learning_rate=0.1)
    optimizer = build_optimizer(trainer.bank, trainer.args)
    head = trainer.heads["layers.1"]
    for parameter in head.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = head.W_dec.detach().clone()
    optimizer.step()
    torch.testing.assert_close(head.W_dec.norm(dim=-1), torch.ones(len(before)))
    assert not torch.allclose(head.W_dec, before)


@pytest.mark.parametrize(
    ("optim", "moment", "part"),
    [("adam", "exp_avg", 0.1), ("muon", "momentum_buffer", 0.05), ("adam8bit", "state1", 0.1)],
)
def test_an_optimizer_never_sees_what_of_a_gradient_lies_along_decoder_rows(tmp_path, optim, moment, part):
    course = Course()
    head = HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4)
    trainer = tiny_trainer(tmp_path, [head], optim=optim, max_steps=1, callbacks=[course])
    trainer.train()
    gradient, rows = (of[0]["heads.layers:1.W_dec"].double() for of in (course.gradients, course.weights))
    along = (gradient * rows).sum(-1, keepdim=True) * rows
    seen = trainer.optimizer.state[trainer.heads["layers.1"].W_dec][moment] / part
    torch.testing.assert_close(seen, (gradient - along).float(), rtol=1e-4, atol=1e-7)
    assert along.norm() > 0.1 * gradient.norm(), "a weak test"


def _of_signs(parameters, lr):
    """Descent by signs, whose first step is that of Signum."""

    def sign(optimizer, args, kwargs):
        for parameter in parameters:
            parameter.grad.sign_()

    optimizer = torch.optim.SGD(parameters, lr=lr)
    optimizer.register_step_pre_hook(sign)
    return optimizer


@pytest.mark.parametrize(
    ("optim", "reference", "steps"),
    [
        ("adam", torch.optim.Adam, 3),
        ("adam8bit", torch.optim.Adam, 3),
        ("muon", torch.optim.Adam, 3),
        ("signum", _of_signs, 1),
    ],
)
def test_logarithms_of_thresholds_move_five_times_as_far_as_other_numbers(tmp_path, optim, reference, steps):
    course, lr = Course(), 2e-3
    head = HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4, activation="jumprelu")
    options = dict(optim=optim, learning_rate=lr, lr_scheduler_type="constant", warmup_steps=0, max_steps=steps)
    tiny_trainer(tmp_path, [head], callbacks=[course], **options).train()
    start, end = (course.weights[i]["heads.layers:1.threshold"] for i in (0, -1))
    number = torch.zeros_like(start, requires_grad=True)
    optimizer = reference([number], lr=lr)
    for gradients in course.gradients[:steps]:
        number.grad = gradients["heads.layers:1.threshold"].clone()
        optimizer.step()
    torch.testing.assert_close(end, start * (5 * number.detach()).exp(), rtol=1e-6, atol=0)
    assert number.abs().max() > 0.9 * lr, "a weak test"


def test_what_is_left_of_a_gradient_is_orthogonal_to_the_rows():
    rows = torch.nn.functional.normalize(torch.randn(9, 5), dim=-1)
    left = torch.randn(9, 5)
    remove_parallel_(left, rows)
    torch.testing.assert_close((left * rows).sum(-1), torch.zeros(9), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [("signum", 5e-3 / 2**0.5), ("adam", 2e-4 / 2**0.5), ("adam8bit", 2e-4 / 2**0.5), ("muon", 2e-3)],
)
def test_default_learning_rates_are_the_seeds(optim, expected):
    assert default_learning_rate(optim, 2**15) == pytest.approx(expected)

import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.sign_sgd import SignSGD
from tiny import Course, tiny_trainer

from sae_accel.ops.rows import remove_parallel_
from sae_accel.recipe.arguments import HeadArguments
from sae_accel.training.optim import Signum, build_optimizer, default_learning_rate


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


def _first_gradients(folder, **kwargs):
    """By head, the gradient over all its parameters that Adam took in the first step."""
    heads = [
        HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4, normalize_decoder=False),
        HeadArguments(hookpoints="layers.2.mlp", type="transcoder", skip_connection=True, k=4, expansion_factor=4),
    ]
    trainer = tiny_trainer(folder, heads, optim="adam", max_steps=1, gradient_accumulation_steps=2, **kwargs)
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

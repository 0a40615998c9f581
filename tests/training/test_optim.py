import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.sign_sgd import SignSGD
from tiny import tiny_trainer

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

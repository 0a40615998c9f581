import pytest
import torch

from sae_accel.ops.metrics import fvu, l0, squared_error, total_variance


def draw(tokens=50, d=7, mean=3.0):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(tokens, d, generator=generator, dtype=torch.float64) + mean
    return target, target + 0.3 * torch.randn(tokens, d, generator=generator, dtype=torch.float64)


def by_hand(target, reconstruction):
    target, reconstruction = target.double(), reconstruction.double()
    return ((target - reconstruction) ** 2).sum() / (target.var(0, correction=0).sum() * len(target))


def test_fvu_is_squared_error_over_variance():
    target, reconstruction = draw()
    torch.testing.assert_close(fvu(target, reconstruction), by_hand(target, reconstruction))
    found = fvu(target.float(), reconstruction.float())
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == pytest.approx(by_hand(target, reconstruction).item(), rel=1e-5)


def test_fvu_is_zero_when_perfect_and_one_for_the_mean():
    target, _ = draw()
    assert fvu(target, target) == 0
    assert fvu(target, target.mean(0).expand_as(target)).item() == pytest.approx(1)


def test_the_mean_is_taken_by_dimension():
    target = torch.tensor([[0.0, 100.0], [2.0, 100.0]])
    assert total_variance(target) == 2
    assert squared_error(target, torch.zeros(2, 2)) == 20_004


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    target, reconstruction = (300 * tensor for tensor in draw(tokens=4000))
    target, reconstruction = target.to(dtype), reconstruction.to(dtype)
    found = fvu(target, reconstruction)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(by_hand(target, reconstruction).item(), rel=1e-5)
    assert total_variance(target).dtype == squared_error(target, reconstruction).dtype == torch.float32


def test_half_precision_and_float32_can_be_mixed():
    target, reconstruction = draw()
    target = target.bfloat16()
    found = fvu(target, reconstruction.float())
    assert found.item() == pytest.approx(by_hand(target, reconstruction).item(), rel=1e-5)


def test_two_tokens_are_enough_for_fvu():
    target, reconstruction = draw(tokens=2)
    torch.testing.assert_close(fvu(target, reconstruction), by_hand(target, reconstruction))


@pytest.mark.parametrize("tokens", [0, 1])
def test_fvu_of_fewer_than_two_tokens_raises(tokens):
    with pytest.raises(ValueError, match=f"at least two tokens, but {tokens} was given"):
        fvu(torch.ones(tokens, 3), torch.ones(tokens, 3))


def test_l0_counts_activations_above_zero():
    acts = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1e-30, 3.0], [-1.0, 0.0, 5.0]])
    assert l0(acts) == (2 + 0 + 3 + 1) / 4
    assert l0(acts.bfloat16()).dtype == torch.float32

"""Which rows train, against loops over tokens."""

import itertools
import math

import pytest
import torch

from sae_accel.activations.trained_rows import Wanted, trained_rows
from sae_accel.lm.hooks import Site


A, B, C = Site("a", "output"), Site("b", "output"), Site("a", "input")
MASK = torch.tensor([[True, True, False], [True, True, True]])


def rows(bad: dict[int, float], count: int = 6, width: int = 4) -> torch.Tensor:
    """Row `i` holds `i`, but for one number of those that are bad."""
    made = torch.arange(float(count))[:, None].repeat(1, width)
    for row, value in bad.items():
        made[row, row % width] = value
    return made


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK), None])
def test_a_token_that_is_not_finite_anywhere_is_left_out_everywhere(mask, value):
    wanted = [0, 1, 3, 4, 5] if mask is MASK else list(range(6))
    for first, second in itertools.product(range(6), repeat=2):
        pieces, wanted_tokens = {A: [rows({first: value})], B: [rows({second: value})]}, Wanted.of(mask)
        found = trained_rows(pieces, wanted_tokens, careful=True)
        kept = [row for row in wanted if row not in (first, second)]
        assert {site: tensor[:, 0].tolist() for site, tensor in found.by_site.items()} == {A: kept, B: kept}
        assert (found.num_tokens, found.non_finite) == (len(kept), len(wanted) - len(kept))
        # Without care nothing that is wanted is left out, but it is known whether something should have been.
        quick = trained_rows(pieces, wanted_tokens, careful=False)
        assert (quick.num_tokens, quick.non_finite, bool(quick.unsure)) == (len(wanted), 0, kept != wanted)
        assert quick.by_site[A].nan_to_num(7, 7, 7).tolist() == pieces[A][0][wanted].nan_to_num(7, 7, 7).tolist()
        assert found.unsure is None
        # A token that does not train has no say.
        places = [place for place, row in (("a", first), ("b", second)) if row in wanted]
        assert (found.non_finite_at and found.non_finite_at.place) == (places[0] if places else None)


def test_large_numbers_whose_sum_is_infinite_are_finite():
    large = rows({2: 3e38})
    large[2] = 3e38
    found = trained_rows({A: [large]}, Wanted.of(None), careful=True)
    assert found.non_finite == 0 and torch.equal(found.by_site[A], large)


def test_experts_that_run_on_equally_many_tokens_do_not_run_on_the_same():
    full = torch.ones_like(MASK)
    pieces = {A: [rows({0: math.nan}, 3)], C: [rows({}, 3)], B: [rows({}, 3)]}
    found = trained_rows(pieces, Wanted.of(full), careful=True)
    # What goes into a module is of the same tokens as what comes out of it.
    assert {site: tensor[:, 0].tolist() for site, tensor in found.by_site.items()} == {
        A: [1, 2],
        C: [1, 2],
        B: [0, 1, 2],
    }
    assert found.non_finite == 1

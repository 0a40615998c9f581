import pytest
import torch

from sae_accel.ops import rows as rows_module
from sae_accel.ops.rows import SLICE_ELEMENTS, Cut, few_slices, normalize_rows_, remove_parallel_, row_slices


ROWS, WIDTH = 5, 4
# Where flat pieces of a matrix of 20 elements begin and end: at rows, within one row, across several, and padded.
BOUNDS = {
    "whole": [0, 20],
    "at rows": [0, 8, 12, 20],
    "in rows": [0, 3, 6, 7, 17, 20],
    "padded": [0, 9, 18, 27],
}
cuts = pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(matrix, bounds):
    """What each process holds of a matrix, padded where it ends before the last process's part does, and its cut."""
    flat = torch.nn.functional.pad(matrix.flatten(), (0, bounds[-1] - matrix.numel()), value=7.0)
    pairs = zip(bounds, bounds[1:], strict=False)
    return [(flat[start:stop].clone(), Cut(start, *matrix.shape)) for start, stop in pairs]


def on_all(monkeypatch, work, count):
    """Of each process, what `work(index)` gives if sums over processes are those that a collective would give."""
    parts = []
    monkeypatch.setattr(rows_module.dist, "all_reduce", lambda sums: parts.append(sums.clone()))
    for index in range(count):
        work(index)
    total = torch.stack(parts).sum(0)
    monkeypatch.setattr(rows_module.dist, "all_reduce", lambda sums: sums.copy_(total))
    return [work(index) for index in range(count)]


@cuts
def test_pieces_are_what_lies_in_a_flat_part_row_by_row(bounds):
    row_of_each = torch.arange(ROWS)[:, None].expand(ROWS, WIDTH)
    for flat, cut in split(row_of_each.double(), bounds):
        pieces = list(cut.pieces(flat))
        held = flat[: max(0, ROWS * WIDTH - cut.offset)]
        assert torch.equal(torch.cat([piece.flatten() for _, piece in pieces]), held)
        for rows, piece in pieces:
            assert torch.equal(piece, row_of_each[rows, : piece.shape[1]].double())
            assert piece.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_whole_rows_that_follow_each_other_are_one_piece():
    pieces = Cut(3, ROWS, WIDTH).pieces(torch.zeros(15))
    assert [(rows, tuple(piece.shape)) for rows, piece in pieces] == [
        (slice(0, 1), (1, 1)),
        (slice(1, 4), (3, WIDTH)),
        (slice(4, 5), (1, 2)),
    ]


@cuts
def test_what_is_done_to_a_matrix_cut_anywhere_is_what_is_done_to_the_whole(bounds, monkeypatch):
    grad, rows = draw(ROWS, WIDTH), draw(ROWS, WIDTH, seed=1)
    unit = rows / rows.norm(dim=1, keepdim=True)
    left = grad - (grad * unit).sum(1, keepdim=True) * unit
    grads, units, wholes = (split(matrix, bounds) for matrix in (grad, unit, rows))

    def remove(index):
        (flat, cut), (along, _) = grads[index], units[index]
        flat = flat.clone()
        remove_parallel_(flat, along, cut)
        return flat

    def normalize(index):
        flat, cut = wholes[index]
        return normalize_rows_(flat.clone(), cut)

    for work, expected in ((remove, left), (normalize, unit)):
        found = torch.cat(on_all(monkeypatch, work, len(bounds) - 1))
        torch.testing.assert_close(found[: ROWS * WIDTH].view(ROWS, WIDTH), expected)
        assert (found[ROWS * WIDTH :] == 7).all(), "padding is nobody's"


def test_rows_of_zeros_stay_finite_when_normalized(monkeypatch):
    monkeypatch.setattr(rows_module.dist, "all_reduce", lambda sums: None)
    assert (normalize_rows_(torch.zeros(ROWS, WIDTH)) == 0).all()
    assert (normalize_rows_(torch.zeros(ROWS * WIDTH), Cut(0, ROWS, WIDTH)) == 0).all()


def test_slices_are_as_many_whole_rows_as_fit_and_one_at_least(monkeypatch):
    monkeypatch.setitem(SLICE_ELEMENTS, "cpu", 3 * WIDTH)
    table = draw(10, WIDTH)
    slices = list(row_slices(table, table + 1))
    assert [len(first) for first, _ in slices] == [3, 3, 3, 1]
    assert torch.equal(torch.cat([first for first, _ in slices]), table)
    assert torch.equal(torch.cat([second for _, second in slices]), table + 1)
    assert [len(first) for (first,) in row_slices(draw(2, 100))] == [1, 1]
    assert len(list(row_slices(table, cut=Cut(0, 10, WIDTH)))) == len(list(row_slices(draw(0, WIDTH)))) == 1


def test_slices_are_larger_only_while_few_are_asked_for():
    before = dict(SLICE_ELEMENTS)
    with pytest.raises(KeyError), few_slices(before["cpu"] + 1):
        assert SLICE_ELEMENTS == before | {"cpu": before["cpu"] + 1}
        raise KeyError
    assert SLICE_ELEMENTS == before

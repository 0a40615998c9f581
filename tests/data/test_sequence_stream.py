"""Streams of documents that a run goes on from the midst of."""

import json

import pytest
from datasets import IterableDataset, load_dataset

from sae_accel.common.errors import InputError
from sae_accel.data import sequence_stream
from sae_accel.data.sequence_stream import SequenceStream


DOCUMENTS = 57


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sequence_stream, "DOCUMENTS_AT_ONCE", 5)
    monkeypatch.setattr(sequence_stream, "SHUFFLE_BUFFER", 6)


@pytest.fixture
def opened(tmp_path):
    """A stream of two files, whose document `i` gives `i % 4` sequences, and the numbers of those that were cut."""
    cut: list[int] = []

    def function(rows: dict[str, list]) -> dict[str, list]:
        cut.extend(rows["number"])
        return {"input_ids": [[number, i] for number in rows["number"] for i in range(number % 4)]}

    def write(documents: int = DOCUMENTS) -> None:
        for name, numbers in (("a", range(30)), ("b", range(30, documents))):
            rows = [json.dumps({"number": number, "other": "x"}) for number in numbers]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))

    def open_it() -> SequenceStream:
        files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
        documents = load_dataset("json", data_files=files, split="train", streaming=True)
        options = dict(batched=True, batch_size=5, remove_columns=["number", "other"])
        return SequenceStream(documents, ["number"], function, documents.map(function, **options))

    write()
    return open_it, cut, write


def ids(rows) -> list[tuple[int, ...]]:
    return [tuple(int(one) for one in row["input_ids"]) for row in rows]


def shaped(stream: SequenceStream, seed: int | None = 3, epoch: int = 0) -> SequenceStream:
    stream = stream.skip(4)
    stream = stream if seed is None else stream.shuffle(seed)
    stream.set_epoch(epoch)
    return stream


def test_sequences_are_those_of_datasets_itself_in_its_order(opened):
    stream = opened[0]()
    everything = ids(stream)
    assert everything == ids(stream.whole) == [(n, i) for n in range(DOCUMENTS) for i in range(n % 4)]
    assert ids(stream.skip(7)) == ids(stream.skip(7).whole) == everything[7:]
    assert ids(stream.take(7)) == ids(stream.take(7).whole) == everything[:7]


def test_shuffling_mixes_what_is_near_and_each_pass_and_seed_in_its_own_way(opened):
    stream = opened[0]()
    plain, mixed = ids(shaped(stream, None)), ids(shaped(stream))
    assert sorted(mixed) == sorted(plain) and mixed != plain
    # It is drawn from six; the last of them came with it.
    assert all(place >= plain.index(one) - 5 for place, one in enumerate(mixed))
    others = [mixed, ids(shaped(stream, 3, epoch=1)), ids(shaped(stream, 4))]
    assert len({tuple(order) for order in others}) == 3 and ids(shaped(opened[0]())) == mixed


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("limit", [None, 40])
def test_it_goes_on_from_anywhere_as_if_it_had_not_stopped(opened, seed, epoch, limit):
    def stream(counts=()):
        made = shaped(opened[0](), seed, epoch)
        made.counts.extend(counts)
        return made if limit is None else made.take(limit)

    everything = ids(stream())
    for place in range(len(everything) + 1):
        before = stream()
        reading = iter(before)
        assert ids(next(reading) for _ in range(place)) == everything[:place]
        for counts in (before.counts, ()):
            # Where it is not known what the blocks hold, all are cut.
            assert ids(stream(counts).begun(place, tells=False)) == everything[place:]


def test_what_has_trained_is_not_cut_again_but_for_what_waits_in_the_buffer(opened):
    open_it, cut, _ = opened
    first = shaped(open_it())
    rows = iter(first)
    for _ in range(60):
        next(rows)
    cut.clear()
    second = shaped(open_it())
    second.counts.extend(first.counts)
    rows = iter(second.begun(60, tells=False))
    next(rows)
    # Sequence 64 is of document 43; the buffer holds few that came long before.
    assert cut and min(cut) >= 25
    cut.clear()
    third = shaped(open_it(), None)
    third.counts.extend(first.counts)
    next(iter(third.begun(60, tells=False)))
    assert min(cut) == 40


def test_data_that_has_changed_is_refused(opened):
    open_it, _, write = opened
    write(documents=47)
    before = open_it()
    list(before)
    write()
    after = open_it()
    after.counts.extend(before.counts)
    with pytest.raises(InputError, match="documents from 45 on gave 3 sequences and now give 7. Restore the data"):
        list(after)


def test_it_says_how_far_it_is(opened, capsys, monkeypatch):
    stream = opened[0]()
    list(stream)
    real = sequence_stream.tqdm
    monkeypatch.setattr(sequence_stream, "tqdm", lambda **options: real(**options | {"delay": 0}))
    for tells in (True, False):
        list(stream.begun(40, tells))
        said = capsys.readouterr().err
        assert ("Skipping documents already used" in said and "documents/s" in said) == tells


def test_a_column_that_nobody_needs_may_hold_anything(opened):
    def rows():
        for number in range(12):
            yield {"number": number, "other": "x" if number % 2 else number}

    documents = IterableDataset.from_generator(rows)
    made = opened[0]()
    assert len(ids(SequenceStream(documents, ["number"], made.cut, made.whole))) == 18


def test_what_cannot_be_read_in_its_midst_is_one_line(opened):
    def rows():
        yield from ({"number": number} for number in range(12))
        raise ValueError("the file is\ndamaged")

    made = opened[0]()
    stream = SequenceStream(IterableDataset.from_generator(rows), ["number"], made.cut, made.whole)
    with pytest.raises(InputError, match="cannot be read to its end: the file is damaged. Check data.path") as raised:
        list(stream)
    assert "\n" not in str(raised.value)

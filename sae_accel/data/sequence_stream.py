import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow
from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from tqdm.auto import tqdm

from ..common.errors import InputError
from .bad_rows import LEFT_OUT, BadRows, Tally, left_out
from .collate import Row
from .reading import reading


# Documents that are cut into sequences at once, as `map` does it to those that are not streamed: what is left over
# from each such block, less than one sequence, is dropped. More would lose less, but a thousand books already fill
# gigabytes, and a stream gives nothing until it has read as many.
DOCUMENTS_AT_ONCE = 1000
# Sequences among which streamed data is shuffled.
SHUFFLE_BUFFER = 1000
# What a line says where a stream cannot be read.
UNREADABLE = "The data cannot be read to its end", "Check data.path, and what is there."


# Documents by column. Those that are passed need not be made objects of Python.
Block: TypeAlias = "pyarrow.Table | dict[str, list]"


class Counts(Protocol):
    """What counts the rows that it leaves out."""

    tally: Tally
    whose: str


class SequenceStream(TorchIterableDataset):
    """
    Sequences that are cut from streamed documents, for one process. Going on from the midst of it, it reads the
    documents before, but cuts and tokenises those alone that are still waiting in the shuffle buffer.

    Args:
        documents (`datasets.IterableDataset`): What is read.
        columns (`list[str]`): Those that are needed to cut them.
        cut (`Callable[[dict[str, list]], dict[str, list]]`): Makes sequences of a block of documents, by column.
        whole (`datasets.IterableDataset`): The same sequences as `datasets` gives them, which knows how to deal out a
            stream's files to processes.
        bad_rows ([`BadRows`], *optional*): What may be left out. A checkpoint keeps what was.
        dealt ([`Counts`], *optional*): What is left out of `whole`.

    Attributes:
        counts (`list[int]`): How many sequences each block that was cut has given. A checkpoint keeps them.
    """

    def __init__(
        self,
        documents: IterableDataset,
        columns: list[str],
        cut: Callable[[dict[str, list]], dict[str, list]],
        whole: IterableDataset,
        bad_rows: BadRows | None = None,
        dealt: Counts | None = None,
    ):
        self.documents, self.columns, self.cut, self.whole = documents, columns, cut, whole
        self.bad_rows, self.dealt = bad_rows or BadRows(), dealt
        self.counts: list[int] = []
        self._first, self._limit, self._begin, self._epoch = 0, None, 0, 0
        self._seed: int | None = None
        self._tells = False

    def __iter__(self) -> Iterator[Row]:
        end = None if self._limit is None else max(0, self._limit - self._begin)
        return islice(self._sequences(), end)

    def skip(self, count: int) -> "SequenceStream":
        """Without the first `count` sequences, in the order of the documents."""
        return self._with(_first=count, whole=self.whole.skip(count))

    def take(self, count: int) -> "SequenceStream":
        """The first `count` sequences."""
        return self._with(_limit=count, whole=self.whole.take(count))

    def shuffle(self, seed: int) -> "SequenceStream":
        """Each sequence is drawn from `SHUFFLE_BUFFER` of those that come next."""
        return self._with(_seed=seed, whole=self.whole.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))

    def begun(self, count: int, tells: bool) -> "SequenceStream":
        """
        The same, as it goes on after `count` sequences.

        Args:
            count (`int`): How many.
            tells (`bool`): Whether a progress bar says how far it is, where this takes more than a moment.
        """
        return self._with(_begin=count, _tells=tells)

    def set_epoch(self, epoch: int) -> None:
        """Shuffles in another order."""
        self._epoch = epoch
        self.whole.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of what has been read."""
        return {"counts": self.counts, "bad_rows": self.bad_rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what a checkpoint has kept. The first blocks may have been read anew already."""
        self.counts[len(self.counts) :] = state["counts"][len(self.counts) :]
        self.bad_rows.load_state_dict(state["bad_rows"])

    def _with(self, **changes: object) -> "SequenceStream":
        other = copy(self)
        other.__dict__.update(changes)
        return other

    def _sequences(self) -> Iterator[Row]:
        buffer, passed, ready, number = self._passed()
        blocks = self._blocks()
        found = self._wanted(blocks, number, {*buffer.places, *ready})

        def in_order() -> Iterator[int]:
            yield from ready
            for i, documents in enumerate(blocks, number):
                start = sum(self.counts[:i])
                found.update(enumerate(self._cut(i, documents), start))
                for place in range(max(start, self._first), start + self.counts[i]):
                    yield from buffer.put(place)
            yield from buffer.rest()

        return islice(map(found.pop, in_order()), self._begin - passed, None)

    def _blocks(self) -> Iterator[Block]:
        documents = self.documents.select_columns(self.columns)
        # Arrow knows nothing of rows that differ in kind, nor of what `datasets` makes of them.
        types = "json" if documents.features is None else str(documents.features.arrow_schema)
        by_arrow = "json" not in types.lower()
        blocks = iter((documents.with_format("arrow") if by_arrow else documents).iter(batch_size=DOCUMENTS_AT_ONCE))
        while True:
            with reading(*UNREADABLE):
                block = next(blocks, None)
            if block is None:
                return
            yield block

    @contextmanager
    def counted(self, tally: Tally, whose: str) -> Iterator[list[Tally]]:
        """
        While open, what is read of `whole` adds what it leaves out to a count.

        Args:
            tally ([`Tally`]): The count so far.
            whose (`str`): What rows are counted in, in words that follow on a row's number.

        Returns:
            `list[Tally]`: the count, once it is closed.
        """
        found = [tally]
        if self.dealt is None:
            yield found
            return
        self.dealt.tally, self.dealt.whose = tally, whose
        with reading(*UNREADABLE):
            yield found
        found[0] = self.dealt.tally

    def _passed(self) -> tuple["_Buffer", int, list[int], int]:
        """
        Goes past the sequences before `_begin` by their numbers alone, as far as it is known how many each block has.

        Returns:
            `tuple`: the shuffle buffer, how many were passed, the numbers of those that come next, and how many blocks
            that took.
        """
        buffer = _Buffer(0 if self._seed is None else SHUFFLE_BUFFER, (self._seed or 0, self._epoch))
        out: list[int] = []
        passed = number = places = 0
        while passed < self._begin and number < len(self.counts):
            for place in range(max(places, self._first), places + self.counts[number]):
                out += buffer.put(place)
            places += self.counts[number]
            number += 1
            gone = min(len(out), self._begin - passed)
            passed += gone
            del out[:gone]
        return buffer, passed, out, number

    def _wanted(self, blocks: Iterator[Block], count: int, wanted: set[int]) -> dict[int, Row]:
        """Reads the first `count` blocks, and cuts those that hold a sequence that is wanted."""
        found: dict[int, Row] = {}
        start = 0
        with skipping(count * DOCUMENTS_AT_ONCE, "documents", self._tells) as bar:
            for i, documents in enumerate(islice(blocks, count)):
                end = start + self.counts[i]
                if not wanted.isdisjoint(range(start, end)):
                    rows = enumerate(self._cut(i, documents), start)
                    found.update((place, row) for place, row in rows if place in wanted)
                start = end
                bar.update(len(documents[self.columns[0]]))
        return found

    def _cut(self, number: int, documents: Block) -> list[Row]:
        by_column = self.cut(documents if isinstance(documents, dict) else documents.to_pydict())
        found = by_column.pop(LEFT_OUT, [])
        columns = [[np.asarray(ids, dtype=np.int32) for ids in sequences] for sequences in by_column.values()]
        rows = [dict(zip(by_column, values, strict=True)) for values in zip(*columns, strict=True)]
        if number == len(self.counts):
            self.bad_rows.add(left_out(found, number * DOCUMENTS_AT_ONCE, len(documents[self.columns[0]])))
            self.counts.append(len(rows))
        elif len(rows) != self.counts[number]:
            raise InputError(
                f"The data is no longer what it was: documents from {number * DOCUMENTS_AT_ONCE:,} on gave "
                f"{self.counts[number]} sequences and give {len(rows)}. Restore it, or start anew in another "
                "training.output_dir."
            )
        return rows


def skipping(total: int, unit: str, tells: bool) -> tqdm:
    """
    A progress bar while a run that goes on passes what has trained, if that takes more than a moment.

    Args:
        total (`int`): How much there is to pass.
        unit (`str`): What is counted.
        tells (`bool`): Whether this process is the one that shows it.
    """
    # In a file each sign of progress is a line of its own.
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        desc="Skipping what has trained",
        unit=f" {unit}",
        unit_scale=True,
        delay=1.0,
        mininterval=seconds,
        maxinterval=seconds,
        disable=not tells,
    )


class _Buffer:
    """Numbers of sequences. For each that comes one is drawn and goes out; of size 0 it mixes nothing."""

    def __init__(self, size: int, seed: tuple[int, int]):
        self.size, self.places = size, list[int]()
        self._random = np.random.default_rng(seed)
        self._slots: list[int] = []

    def put(self, place: int) -> list[int]:
        """Those that come out: one, or none as long as there is room."""
        if not self.size:
            return [place]
        if len(self.places) < self.size:
            self.places.append(place)
            return []
        if not self._slots:
            self._slots = self._random.integers(0, self.size, size=1000).tolist()
        slot = self._slots.pop()
        out, self.places[slot] = self.places[slot], place
        return [out]

    def rest(self) -> list[int]:
        """All that are left, mixed."""
        return self._random.permutation(self.places).tolist()

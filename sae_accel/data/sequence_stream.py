"""
Cuts streamed documents into sequences and shuffles them, and resumes without tokenising everything again.

A stream has no index, so a run that resumes must read again all documents that it has passed. To cut and tokenise them
is the slow part, and this file avoids it. A checkpoint keeps how many sequences each block of 1,000 documents gave.
From these counts the shuffle buffer is replayed with the numbers of sequences alone. Only the blocks with sequences
that still wait in the buffer are cut again. With several processes, `datasets` deals out the files of the stream
instead (`whole`).
"""

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


# Documents that are cut into sequences together, in a stream as in `map`. The rest of each block, less than one
# sequence, is dropped. Larger blocks would drop less, but a thousand books already fill gigabytes, and a stream gives
# no sequence before it has read a whole block.
DOCUMENTS_AT_ONCE = 1000
# Sequences in the shuffle buffer of a stream.
SHUFFLE_BUFFER = 1000
# Begin and end of the error for a stream that cannot be read.
UNREADABLE = "The data cannot be read to its end", "Check data.path, and what is there."


# Documents by column. Documents that are only passed stay in Arrow, without a Python object for each.
Block: TypeAlias = "pyarrow.Table | dict[str, list]"


class Counts(Protocol):
    """Counts the rows that it leaves out."""

    tally: Tally
    whose: str


class SequenceStream(TorchIterableDataset):
    """
    Sequences that are cut from streamed documents, for one process. A stream that resumes reads the documents before
    its position, but cuts and tokenises only the ones that still wait in the shuffle buffer.

    Args:
        documents (`datasets.IterableDataset`): The documents.
        columns (`list[str]`): The columns of the documents that `cut` needs.
        cut (`Callable[[dict[str, list]], dict[str, list]]`): Makes sequences from a block of documents, by column.
        whole (`datasets.IterableDataset`): The same sequences as a stream of `datasets`, which can deal out its files
            to processes.
        bad_rows ([`BadRows`], *optional*): Counts the rows that are left out. A checkpoint keeps the counts.
        dealt ([`Counts`], *optional*): Counts the rows that are left out of `whole`.

    Attributes:
        counts (`list[int]`): The number of sequences that each block gave. A checkpoint keeps these numbers.
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
        """Returns the stream without its first `count` sequences, in the order of the documents."""
        return self._with(_first=count, whole=self.whole.skip(count))

    def take(self, count: int) -> "SequenceStream":
        """Returns the first `count` sequences of the stream."""
        return self._with(_limit=count, whole=self.whole.take(count))

    def shuffle(self, seed: int) -> "SequenceStream":
        """Returns the stream shuffled: each sequence is drawn from the next `SHUFFLE_BUFFER` ones."""
        return self._with(_seed=seed, whole=self.whole.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))

    def begun(self, count: int, tells: bool) -> "SequenceStream":
        """
        Returns the same stream from the position after `count` sequences.

        Args:
            count (`int`): Sequences that have trained.
            tells (`bool`): Whether a progress bar is shown if this takes more than a moment.
        """
        return self._with(_begin=count, _tells=tells)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which gives the next pass another order."""
        self._epoch = epoch
        self.whole.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts for a checkpoint."""
        return {"counts": self.counts, "bad_rows": self.bad_rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counts from a checkpoint, except for blocks that have been read since."""
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
        # Arrow does not know the type that `datasets` gives to rows of several types.
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
        Adds the rows that `whole` leaves out while it is read to a count.

        Args:
            tally ([`Tally`]): The count so far.
            whose (`str`): Words that follow a row's number and say among which rows it is counted.

        Returns:
            `list[Tally]`: the count, in a list that is filled when the context closes.
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
        Replays the shuffle buffer up to `_begin` with numbers of sequences, as far as the counts of blocks are known.

        Returns:
            `tuple`: the shuffle buffer, the sequences that were passed, the numbers of the sequences that come next,
            and the number of blocks that were replayed.
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
        """Reads the first `count` blocks, and cuts the blocks that hold a wanted sequence."""
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
                f"The data has changed since the checkpoint: documents from {number * DOCUMENTS_AT_ONCE:,} on gave "
                f"{self.counts[number]} sequences and now give {len(rows)}. Restore the data, or start a new run in "
                "another training.output_dir."
            )
        return rows


def skipping(total: int, unit: str, tells: bool) -> tqdm:
    """
    Returns a progress bar for the time in which a run that resumes passes the data that has trained.

    Args:
        total (`int`): Units to pass.
        unit (`str`): Name of the unit.
        tells (`bool`): Whether this process shows the bar.
    """
    # In a log file each update of the bar is a line of its own.
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        desc="Skipping documents already used",
        unit=f" {unit}",
        unit_scale=True,
        delay=1.0,
        mininterval=seconds,
        maxinterval=seconds,
        disable=not tells,
    )


class _Buffer:
    """Mixes numbers of sequences: for each one that comes in, a random one goes out. Size 0 mixes nothing."""

    def __init__(self, size: int, seed: tuple[int, int]):
        self.size, self.places = size, list[int]()
        self._random = np.random.default_rng(seed)
        self._slots: list[int] = []

    def put(self, place: int) -> list[int]:
        """Takes in a number, and returns the number that goes out; nothing as long as there is room."""
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
        """Returns all numbers that are left, mixed."""
        return self._random.permutation(self.places).tolist()

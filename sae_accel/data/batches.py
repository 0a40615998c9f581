"""
Deals the training data out to processes as batches, from any position in the data.

A run that resumes must see the batches that it would have seen without a stop, so the order depends only on the seed,
the epoch and the number of processes. Data with a length are split by index: process `r` of `n` reads batches `r`,
`r + n`, ... A stream is split by its files, or by rows where its files cannot be dealt out evenly. All processes yield
the same number of batches, since a process without a batch would make the others wait forever; a process that has no
rows left yields batches without sequences.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from ..common.errors import InputError
from ..processes.agreement import gather_objects, gather_together, raise_together
from ..recipe.arguments import SaeTrainingArguments
from .bad_rows import Tally
from .collate import IndexedRows, Row, Rows, collate
from .sequence_stream import SequenceStream, skipping


T = TypeVar("T")


_NO_BATCH = (
    "The training data has no full batch. Use more data, or lower --training.per_device_train_batch_size or "
    "--data.ctx_len."
)


class Position(NamedTuple):
    """
    A position in the training data.

    Args:
        epoch (`int`): Complete passes over the data.
        batches (`int`): Batches of each process that are done in the current pass.
    """

    epoch: int = 0
    batches: int = 0


# The batches of one optimizer step, and the position in the data after them.
Window = tuple[list[dict[str, Tensor]], Position]


class Batches:
    """
    The batches of tokens that this process reads, in a fixed order that can start at any position.

    From data with a length, process `r` of `n` reads batches `r`, `r + n`, ... From a stream it reads its own part.
    Every process yields the same number of batches; a process whose part of a stream has ended yields batches without
    sequences.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or similar): Rows with `input_ids`.
        args (`SaeTrainingArguments`): Batch size, accumulation and seed.
        accelerator (`Accelerator`): The index of this process, and its device.
        pad_token_id (`int`): Id that pads rows that are shorter than others.
    """

    def __init__(self, dataset: Rows | None, args: SaeTrainingArguments, accelerator: Accelerator, pad_token_id: int):
        self.dataset = dataset
        self.args = args
        self.accelerator = accelerator
        self.collate = partial(collate, pad_token_id=pad_token_id)
        self.has_length = isinstance(dataset, IndexedRows)

    def windows(self, position: Position) -> Iterator[Window]:
        """Yields the batches of each optimizer step, without end, with the position in the data after them."""
        epoch, done = position
        while True:
            batches = self._one_pass(epoch, skip=done, drop_last=True, counts=not epoch)
            while window := list(islice(batches, self.args.gradient_accumulation_steps)):
                done += len(window)
                yield window, Position(epoch, done)
            if not done:
                raise InputError(_NO_BATCH)
            epoch, done = epoch + 1, 0

    def one_pass(self, epoch: int = 0, skip: int = 0, drop_last: bool = True) -> Iterator[dict[str, Tensor]]:
        """
        Yields one pass over the data, from the batch after `skip`. The first pass keeps the dataset's order; each
        later pass has an order of its own. With `drop_last`, rows that do not fill a batch are left out.
        """
        return self._one_pass(epoch, skip, drop_last, counts=False)

    def _one_pass(self, epoch: int, skip: int, drop_last: bool, counts: bool) -> Iterator[dict[str, Tensor]]:
        """Like `one_pass`; with `counts`, the rows that this pass leaves out of a stream count as the run's."""
        if self.has_length:
            batches = self._from_rows(epoch, skip, drop_last)
        else:
            batches = self._from_stream(epoch, skip, drop_last, counts)
        for batch in batches:
            yield {name: value.to(self.accelerator.device, non_blocking=True) for name, value in batch.items()}

    def max_steps(self) -> int:
        """
        Returns the optimizer steps of the run: the smaller of `max_steps` and `max_tokens`, or one pass if neither is
        set.

        Raises:
            `InputError`: if the data is streamed and neither is set, or the data is less than a batch.
        """
        window = self.args.gradient_accumulation_steps
        limits = [] if self.args.max_steps is None else [self.args.max_steps]
        if self.args.max_tokens is not None:
            batch = next(self.one_pass(), None)
            if batch is None:
                raise InputError(_NO_BATCH)
            if "input_ids" not in batch:
                raise InputError(
                    "training.max_tokens counts tokens of text, and the data has none. Set training.max_steps."
                )
            tokens = max(gather_objects(batch["input_ids"].numel())) * self.accelerator.num_processes * window
            limits.append(math.ceil(self.args.max_tokens / tokens))
        if limits:
            return min(limits)
        if not self.has_length:
            raise InputError(
                "The length of streamed data is not known. Set training.max_steps or training.max_tokens."
            )
        return math.ceil(len(self._batch_rows(0, drop_last=True)) / window)

    def _batch_rows(self, epoch: int, drop_last: bool) -> list[Tensor]:
        """Returns the row numbers of each batch of this process, `(batch,)`; empty where only others have rows."""
        length, size, processes = (
            len(self._indexed()),
            self.args.per_device_train_batch_size,
            self.accelerator.num_processes,
        )
        if drop_last:
            self._check_size(length)
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        order = torch.randperm(length, generator=generator) if epoch else torch.arange(length)  # (length,)
        together = size * processes
        rounds = length // together if drop_last else math.ceil(length / together)
        start = self.accelerator.process_index * size
        return [order[i * together + start :][:size] for i in range(rounds)]

    def _from_rows(self, epoch: int, skip: int, drop_last: bool) -> Iterator[dict[str, Tensor]]:
        places = self._batch_rows(epoch, drop_last)[skip:]
        own = [batch for batch in places if len(batch)]
        pins = self.accelerator.device.type == "cuda"
        yield from self._loader(self._indexed(), batch_sampler=(batch.tolist() for batch in own), pin_memory=pins)
        for _ in places[len(own) :]:
            yield _without_rows(self.collate([self._indexed()[0]]))

    def _from_stream(self, epoch: int, skip: int, drop_last: bool, counts: bool) -> Iterator[dict[str, Tensor]]:
        reader = _Reader(self.dataset, self.accelerator, counts)
        own = raise_together(lambda: reader.read(lambda: self._own_part(epoch, skip, drop_last)))
        nothing = torch.zeros(0, 1, dtype=torch.long)  # (0 sequences, 1 token)
        batch = {"input_ids": nothing, "attention_mask": nothing}
        while True:
            found, everyone = gather_together(
                lambda: reader.read(lambda: next(own, None)), lambda batch: (batch is not None, reader.tally)
            )
            reader.settle([tally for _, tally in everyone])
            if not any(has_more for has_more, _ in everyone):
                return
            batch = _without_rows(batch) if found is None else found
            yield batch

    def _loader(self, rows: Any, **options: Any) -> DataLoader:
        # A loader draws from its generator as it starts. With a generator of its own, torch's generator is in the same
        # state in a run that resumes and in one that never stopped.
        return DataLoader(rows, collate_fn=self.collate, generator=torch.Generator(), **options)

    def _indexed(self) -> IndexedRows:
        assert isinstance(self.dataset, IndexedRows), "only data with a length has indexed rows"
        return self.dataset

    def _own_part(self, epoch: int, skip: int, drop_last: bool) -> Iterator[dict[str, Tensor]]:
        """Returns this process's batches of a stream, from the one after `skip`."""
        if epoch and (set_epoch := getattr(self.dataset, "set_epoch", None)):
            set_epoch(epoch)
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        size, tells = self.args.per_device_train_batch_size, self.accelerator.is_main_process
        rows: Any = self.dataset
        if isinstance(rows, SequenceStream) and processes == 1:
            return iter(self._loader(rows.begun(skip * size, tells), batch_size=size, drop_last=drop_last))
        if isinstance(rows, SequenceStream):
            rows = rows.whole
        if processes > 1:
            is_known = isinstance(rows, IterableDataset)
            rows = split_dataset_by_node(rows, index, processes) if is_known else _EveryNth(rows, index, processes)
        batches = iter(self._loader(rows, batch_size=size, drop_last=drop_last))
        with skipping(skip, "batches", tells) as bar:
            for _ in range(skip):
                next(batches, None)
                bar.update()
        return batches

    def _check_size(self, sequences: int) -> None:
        size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        if sequences < size * processes:
            raise InputError(
                f"The training data has {sequences} sequences, fewer than one batch of {size} on {processes} "
                "process(es). Lower training.per_device_train_batch_size, data.eval_examples or data.ctx_len, or use "
                "more data."
            )


class _Reader:
    """
    Reads this process's part of a stream, and counts the rows that all processes leave out.

    Args:
        dataset (`Rows`, *optional*): The stream.
        accelerator (`Accelerator`): The index of this process.
        counts (`bool`): Whether the rows that are left out count as the run's.

    Attributes:
        tally ([`Tally`]): Rows that this process has left out.
    """

    def __init__(self, dataset: Rows | None, accelerator: Accelerator, counts: bool):
        # A single process counts while it cuts.
        is_dealt = isinstance(dataset, SequenceStream) and accelerator.num_processes > 1
        self.stream = cast(SequenceStream, dataset) if is_dealt else None
        self.counts, self.tally = counts, Tally()
        if self.stream is not None:
            # If the files cannot be dealt out evenly, every process reads all of them and keeps some of the sequences.
            self.apart = self.stream.whole.num_shards % accelerator.num_processes == 0
            self.whose = f" of the rows that process {accelerator.process_index} reads" if self.apart else ""

    def read(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`, which reads the stream."""
        if self.stream is None:
            return work()
        with self.stream.counted(self.tally, self.whose) as found:
            result = work()
        self.tally = found[0]
        return result

    def settle(self, everyone: list[Tally]) -> None:
        """
        Adds up the counts of all processes to the run's count.

        Raises:
            `InputError`: on every process, if there are too many bad rows.
        """
        if self.stream is None or not self.counts:
            return
        total = reduce(Tally.plus, everyone) if self.apart else max(everyone)
        bad_rows = self.stream.bad_rows
        # A run that resumes reads the stream from its start, so its count is too small until it is past the old
        # position.
        if total.seen >= bad_rows.tally.seen:
            bad_rows.settle(total)


def sequence_length(dataset: Rows | None) -> int:
    """
    Returns the tokens per row, which the spread of heads is planned with: 1 for rows without ids, 2,048 for a stream.
    """
    if not isinstance(dataset, IndexedRows) or not len(dataset):
        return 2048
    return len(dataset[0].get("input_ids", [0]))


def fingerprint(dataset: Rows | None) -> str | None:
    """Returns a hash of the first rows, to tell apart datasets at the same path; None for a stream."""
    if not isinstance(dataset, IndexedRows):
        return None
    found = hashlib.sha256()
    for row in (dataset[i] for i in range(min(3, len(dataset)))):
        # The hash covers only columns that training reads.
        for name in ("input_ids", "attention_mask", "pixel_values"):
            if name in row:
                found.update(np.asarray(row[name], dtype=np.float64).tobytes())
    return found.hexdigest()[:16]


class _EveryNth(TorchIterableDataset):
    """Yields rows `first`, `first + step`, ... of a stream that cannot deal out its files itself."""

    def __init__(self, stream: Iterable[Row], first: int, step: int):
        self.stream, self.first, self.step = stream, first, step

    def __iter__(self) -> Iterator[Row]:
        return islice(self.stream, self.first, None, self.step)


def _without_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:0] for name, value in batch.items()}

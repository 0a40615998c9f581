import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from .arguments import SaeTrainingArguments
from .data import collate
from .errors import InputError


class Position(NamedTuple):
    """
    A place in the training data.

    Args:
        epoch (`int`): Passes over the data that are complete.
        batches (`int`): Batches of this process that are done in the present one.
    """

    epoch: int = 0
    batches: int = 0


class Batches:
    """
    The batches of tokens that this process reads, in an order that any process can start from anywhere.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or alike): Rows with `input_ids`.
        args (`SaeTrainingArguments`): Batch size, accumulation and seed.
        accelerator (`Accelerator`): Deals batches to processes and moves them to their device.
        pad_token_id (`int`): Fills up rows that are shorter than others.
    """

    def __init__(self, dataset: Any, args: SaeTrainingArguments, accelerator: Accelerator, pad_token_id: int):
        self.dataset = dataset
        self.args = args
        self.accelerator = accelerator
        self.collate = partial(collate, pad_token_id=pad_token_id)
        self.has_length = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")

    def windows(self, position: Position) -> Iterator[tuple[list[dict[str, Tensor]], Position]]:
        """The batches of each optimizer step, without end, with the position that comes after them."""
        epoch, done = position
        while True:
            loader = self.one_pass(epoch)
            batches = iter(skip_first_batches(loader, done) if done else loader)
            while window := list(islice(batches, self.args.gradient_accumulation_steps)):
                done += len(window)
                yield window, Position(epoch, done)
            if not done:
                raise InputError(
                    "The training data has no full batch. Use more data, or a smaller batch or data.ctx_len."
                )
            epoch, done = epoch + 1, 0

    def one_pass(self, epoch: int = 0, drop_last: bool = True) -> DataLoader:
        """One pass over the data: the first keeps the dataset's order, each later one has an order of its own."""
        dataset, size = self.dataset, self.args.per_device_train_batch_size
        if self.has_length:
            if drop_last:
                self._check_size(len(dataset))
            if epoch:
                generator = torch.Generator().manual_seed(self.args.seed + epoch)
                dataset = Subset(dataset, torch.randperm(len(dataset), generator=generator).tolist())
        elif epoch:
            dataset.set_epoch(epoch)
        return self.accelerator.prepare_data_loader(
            DataLoader(dataset, size, drop_last=drop_last, collate_fn=self.collate)
        )

    def max_steps(self) -> int:
        """
        Optimizer steps of the run: the shortest of `max_steps` and `max_tokens`, or one pass.

        Raises:
            `InputError`: if the data is streamed and neither is set, or there is less than a batch.
        """
        window = self.args.gradient_accumulation_steps
        limits = [] if self.args.max_steps is None else [self.args.max_steps]
        if self.args.max_tokens is not None:
            batch = next(iter(self.one_pass()))
            if "input_ids" not in batch:
                raise InputError("training.max_tokens counts tokens of text, and the data has none. Set max_steps.")
            tokens = batch["input_ids"].numel() * self.accelerator.num_processes * window
            limits.append(math.ceil(self.args.max_tokens / tokens))
        if limits:
            return min(limits)
        if not self.has_length:
            raise InputError(
                "The length of streamed data is not known. Set training.max_steps or training.max_tokens."
            )
        return math.ceil(len(self.one_pass()) / window)

    def _check_size(self, sequences: int) -> None:
        size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        if sequences < size * processes:
            raise InputError(
                f"The training data has {sequences} sequences, fewer than one batch of {size} on {processes} "
                "process(es). Lower training.per_device_train_batch_size, data.eval_examples or data.ctx_len, or use "
                "more data."
            )

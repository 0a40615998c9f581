"""
Turns rows into sequences of tokens.

Texts are tokenised, joined with a separator after each, and cut into sequences of exactly `ctx_len` tokens. The rest
of each block of 1,000 documents, less than one sequence, is dropped. Rows that already hold token ids are only cut
into pieces of at most `ctx_len`. One function does this for a block of rows by column, so that it serves both
`Dataset.map`, which caches its result, and a stream. The function also returns which rows it left out, and why.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..common.errors import InputError
from .bad_rows import LEFT_OUT, WHY, BadRows, Tally, bad_ids, bad_texts, left_out
from .sequence_stream import DOCUMENTS_AT_ONCE


# Column that holds the report of the rows that a block left out, in a row of its own; null for every sequence.
_REPORT = "_report"


@dataclass(frozen=True)
class Cutting:
    """
    The function and the columns by which documents become sequences.

    Args:
        function (`Callable[..., dict[str, list]]`): Makes sequences from documents, both by column. Its result also
            holds, under `LEFT_OUT`, the documents that gave no sequence.
        options (`dict[str, Any]`): Further arguments of the function.
        reads (`list[str]`): The columns of the documents that the function needs.
        gives (`list[str]`): The columns of the sequences.
        verb (`str`): One word for the progress bar, such as `"Tokenizing"`.
    """

    function: Callable[..., dict[str, list]]
    options: dict[str, Any]
    reads: list[str]
    gives: list[str]
    verb: str

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Returns the sequences of a block of documents, and the left-out documents under `LEFT_OUT`."""
        return self.function(rows, **self.options)

    @property
    def features(self) -> Features:
        """The types of the sequences' columns; a block without sequences would not show them."""
        return Features({name: List(Value("int8" if name == "attention_mask" else "int32")) for name in self.gives})


def cutting_of_ids(kept: list[str], columns: list[str], ctx_len: int, vocab_size: int) -> Cutting:
    """
    Returns the cutting of rows that hold token ids.

    Args:
        kept (`list[str]`): `input_ids`, and `attention_mask` if there is one.
        columns (`list[str]`): All columns of the rows.
        ctx_len (`int`): Tokens in a sequence.
        vocab_size (`int`): Ids that the LM knows.
    """
    options = {"ctx_len": ctx_len, "columns": kept, "vocab_size": vocab_size}
    return Cutting(_cut_rows, options, _with_why(kept, columns), kept, "Cutting")


def cutting_of_text(
    text_column: str,
    columns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    separator: int,
    ctx_len: int,
    vocab_size: int | None,
) -> Cutting:
    """
    Returns the cutting of rows that hold texts.

    Args:
        text_column (`str`): The column with the text.
        columns (`list[str]`): All columns of the rows.
        tokenizer (`PreTrainedTokenizerBase`): The LM's tokenizer.
        separator (`int`): Id that follows each document.
        ctx_len (`int`): Tokens in a sequence.
        vocab_size (`int`, *optional*): Ids that the LM knows.
    """
    options = {"tokenizer": tokenizer, "separator": separator, "ctx_len": ctx_len}
    options |= {"text_column": text_column, "vocab_size": vocab_size}
    return Cutting(_pack_documents, options, _with_why([text_column], columns), ["input_ids"], "Tokenizing")


def cut(dataset: Dataset, columns: list[str], cutting: Cutting, num_proc: int | None) -> tuple[Dataset, Tally]:
    """
    Cuts rows that have a length.

    Args:
        dataset (`datasets.Dataset`): The rows.
        columns (`list[str]`): All columns of the rows.
        cutting ([`Cutting`]): How the rows are cut.
        num_proc (`int`, *optional*): Processes; one if not given.

    Returns:
        `tuple`: the sequences, and the tally of the rows that gave none.
    """
    # The report of left-out rows is a column of the result, so that it also comes out of a cache.
    mapped = dataset.map(
        _cut_with_report,
        batched=True,
        with_indices=True,
        batch_size=DOCUMENTS_AT_ONCE,
        remove_columns=columns,
        features=Features({**cutting.features, _REPORT: Value("string")}),
        fn_kwargs={"function": cutting.function, "options": cutting.options, "gives": cutting.gives},
        num_proc=num_proc,
        desc=cutting.verb,
    )
    reports = mapped.data[_REPORT]
    sequences = mapped.remove_columns(_REPORT)
    if reports.null_count == len(reports):
        return sequences, Tally(len(dataset))
    is_sequence = reports.is_null().to_numpy(zero_copy_only=False)
    tally = Tally()
    for report in reports.drop_null().to_pylist():
        tally = tally.plus(Tally(*json.loads(report)))
    return sequences.select(is_sequence.nonzero()[0]), tally._replace(seen=len(dataset))


class Dealt:
    """
    Cuts the rows of a stream that `datasets` deals out to processes, and counts the rows that it leaves out.

    Args:
        cutting ([`Cutting`]): How the rows are cut.
        bad_rows ([`BadRows`], *optional*): Also counts each block, for a stream without another counter.

    Attributes:
        tally ([`Tally`]): Rows that were left out since this attribute was last set.
        whose (`str`): Words that follow a row's number and say among which rows it is counted.
    """

    def __init__(self, cutting: Cutting, bad_rows: BadRows | None = None):
        self.cutting, self.bad_rows = cutting, bad_rows
        self.tally, self.whose = Tally(), ""

    def __call__(self, rows: dict[str, list], numbers: list[int]) -> dict[str, list]:
        """Returns the sequences of a block of documents, and counts the documents that gave none."""
        sequences = self.cutting(rows)
        found = sequences.pop(LEFT_OUT, [])
        tally = left_out(found, numbers[0], len(numbers), self.whose)
        self.tally = self.tally.plus(tally)
        if self.bad_rows is not None:
            self.bad_rows.add(tally)
        return sequences

    def of(self, documents: IterableDataset, columns: list[str]) -> IterableDataset:
        """Returns the sequences of a stream of documents."""
        return documents.map(
            self,
            batched=True,
            with_indices=True,
            batch_size=DOCUMENTS_AT_ONCE,
            remove_columns=columns,
            features=self.cutting.features,
        )


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of each text, without special tokens."""
    # verbose=False: the documents are cut later, so the tokenizer's warning about their length is wrong. The warning
    # would also leave a mark in the tokenizer, and `datasets` would take it for another one and miss its cache.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _with_why(reads: list[str], columns: list[str]) -> list[str]:
    return [*reads, *([WHY] if WHY in columns else [])]


def _cut_with_report(
    rows: dict[str, list],
    numbers: list[int],
    function: Callable[..., dict[str, list]],
    options: dict[str, Any],
    gives: list[str],
) -> dict[str, list]:
    sequences = function(rows, **options)
    found = sequences.pop(LEFT_OUT, [])
    sequences[_REPORT] = [None] * len(sequences[gives[0]])
    if found:
        for name in gives:
            sequences[name].append([])
        sequences[_REPORT].append(json.dumps(left_out(found, numbers[0], len(numbers))))
    return sequences


def _pack_documents(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    separator: int,
    ctx_len: int,
    text_column: str,
    vocab_size: int | None,
) -> dict[str, list]:
    texts = rows[text_column]
    if bad := bad_texts(texts, text_column, rows.get(WHY)):
        texts = _without(texts, bad)
    documents = tokenize(texts, tokenizer) if texts else []
    ids = [token for document in documents for token in (*document, separator)]  # All documents of the block, joined.
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise InputError(
            f"The tokenizer gives id {max(ids)}, but the LM knows {vocab_size} ids. Use the tokenizer of the LM."
        )
    return {"input_ids": [ids[i : i + ctx_len] for i in range(0, len(ids) - ctx_len + 1, ctx_len)], LEFT_OUT: bad}


def _cut_rows(rows: dict[str, list], ctx_len: int, columns: list[str], vocab_size: int) -> dict[str, list]:
    """Cuts rows that are longer than a sequence into pieces; keeps shorter rows as they are."""
    values = {column: rows[column] for column in columns}
    if bad := bad_ids(rows["input_ids"], values.get("attention_mask"), vocab_size, rows.get(WHY)):
        values = {column: _without(found, bad) for column, found in values.items()}
    pieces: dict[str, list] = {
        column: [row[i : i + ctx_len] for row in found for i in range(0, len(row), ctx_len)]
        for column, found in values.items()
    }
    return pieces | {LEFT_OUT: bad}


def _without(values: list[Any], bad: list[tuple[int, str]]) -> list[Any]:
    places = {place for place, _ in bad}
    return [value for i, value in enumerate(values) if i not in places]

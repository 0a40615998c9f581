"""
Makes sequences for training and evaluation from a recipe's `data`.

This file holds the steps in their order: open the data, check the columns on the first row, tokenise and cut the rows,
hold out the first sequences for evaluation, and shuffle the rest. Data with a length is cut before training, and
`datasets` caches the result. A stream is cut while it trains.
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from ..common.errors import InputError
from ..recipe.arguments import DataArguments
from .bad_rows import BadRows, bad_texts
from .cutting import Cutting, Dealt, cut, cutting_of_ids, cutting_of_text, tokenize
from .reading import reading
from .separator import separator_id
from .sequence_stream import DOCUMENTS_AT_ONCE, SequenceStream
from .sources import open_dataset
from .token_file import TokenFile, is_token_file


def chunk_and_tokenize(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ctx_len: int = 2048,
    text_column: str = "text",
    num_proc: int | None = None,
    separator: str | int | None = None,
) -> Any:
    """
    Tokenises documents, joins them with a separator after each, and cuts the result into sequences.

    The separator is the only token that is added: a BOS would stand in the middle of sequences. The rest of every
    1,000 documents (or of a process's share, if that is less) that does not fill a last sequence is dropped. Rows
    without a text are left out, up to 1 % of all rows, and their number is printed; for a stream it is not printed,
    since its end is not known.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or a dict of them): Rows of text.
        tokenizer (`PreTrainedTokenizerBase`): The LM's tokenizer.
        ctx_len (`int`, defaults to 2048): Tokens in a sequence.
        text_column (`str`, defaults to `"text"`): Column with the text.
        num_proc (`int`, *optional*): Processes; one if not given. A stream does not use it.
        separator (`str` or `int`, *optional*): The token that follows each document, or its id. If not given, EOS, or
            SEP if the tokenizer has no EOS.

    Returns:
        A dataset of the same kind with one column, `input_ids`, of `ctx_len` ids each.

    Raises:
        `InputError`: if there is no such column of text, the tokenizer has no separator, more than 1 % of the rows
            have no text, or the data is less than one sequence. Errors in a stream after its first row are raised when
            it is read.

    Examples:
        ```python
        from sae_accel import chunk_and_tokenize

        tokenized = chunk_and_tokenize(dataset, tokenizer, ctx_len=2048)
        tokenized[0]["input_ids"]  # ctx_len ids

        # A stream is tokenised while it is read.
        stream = chunk_and_tokenize(dataset.to_iterable_dataset(), tokenizer, ctx_len=2048)
        next(iter(stream))["input_ids"]
        ```
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        options: dict[str, Any] = {"ctx_len": ctx_len, "text_column": text_column}
        options |= {"num_proc": num_proc, "separator": separator}
        return type(dataset)(
            {split: chunk_and_tokenize(rows, tokenizer, **options) for split, rows in dataset.items()}
        )
    dataset = dataset.with_format(None)
    first = _first_row(dataset)
    columns = _columns(dataset, first)
    _check_is_text(dataset, first, columns, text_column)
    cutting = cutting_of_text(
        text_column, columns, tokenizer, separator_id(separator, tokenizer), ctx_len, vocab_size=None
    )
    if isinstance(dataset, Dataset):
        return _of_all(dataset, columns, cutting, num_proc, BadRows(whole=True))
    return Dealt(cutting, BadRows()).of(dataset, columns)


def load_tokens(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase | None = None, *, vocab_size: int
) -> tuple[Any, Any]:
    """
    Makes the sequences that a recipe's `data` describes: for training, shuffled, and held out for evaluation.

    The first `eval_examples` sequences, in the dataset's own order, are held out. Rows that cannot become a sequence
    are left out, up to `max_bad_rows`. Their number is printed here, or for a stream at the end of a run.

    Args:
        arguments ([`DataArguments`]): The recipe's `data`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The LM's tokenizer. Only text needs one.
        vocab_size (`int`): Ids that the LM knows.

    Returns:
        `tuple`: rows with `input_ids` for training, and rows for evaluation or None. Both work in a `DataLoader` with
        `collate`.

    Raises:
        `InputError`: if the data cannot be found or read, has too many bad rows, or is too little.

    Examples:
        ```python
        from sae_accel import DataArguments, load_tokens

        data = DataArguments(path="quickstart/text", ctx_len=256, eval_examples=8)
        train, evaluation = load_tokens(data, tokenizer, vocab_size=len(tokenizer))
        len(evaluation)  # 8 sequences of 256 ids
        ```
    """
    sequences: Any
    bad_rows = BadRows(arguments.bad_rows, arguments.max_bad_rows, whole=not arguments.streaming)
    if is_token_file(arguments.path):
        length, width = arguments.sequence_length, arguments.token_dtype
        sequences = TokenFile(arguments.path, length, vocab_size, width, bad_rows)
    else:
        sequences = _tokenized(open_dataset(arguments), arguments, tokenizer, vocab_size, bad_rows)
    held_out = arguments.eval_examples
    if isinstance(sequences, SequenceStream):
        # A stream's length is not known, so reading shows whether it goes on after the held-out sequences.
        _check_enough(sum(1 for _ in sequences.take(held_out + 1)), arguments)
        train, evaluation = sequences.skip(held_out), sequences.take(held_out)
    else:
        _check_enough(len(sequences), arguments)
        train, evaluation = sequences.select(range(held_out, len(sequences))), sequences.select(range(held_out))
    if arguments.shuffle_seed is not None:
        train = train.shuffle(seed=arguments.shuffle_seed)
    if arguments.max_examples is not None:
        most = arguments.max_examples
        train = train.take(most) if isinstance(train, SequenceStream) else train.select(range(min(most, len(train))))
    return train, evaluation if held_out else None


def _tokenized(
    dataset: Dataset | IterableDataset,
    arguments: DataArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    bad_rows: BadRows,
) -> Dataset | SequenceStream:
    dataset = dataset.with_format(None)
    first = _first_row(dataset)
    columns = _columns(dataset, first)
    ctx_len, text_column = arguments.sequence_length, arguments.text_column
    if "input_ids" in columns:
        kept: list[str] = [column for column in ("input_ids", "attention_mask") if column in columns]
        _check_are_ids(dataset, first, kept)
        cutting = cutting_of_ids(kept, columns, ctx_len, vocab_size)
    else:
        _check_is_text(dataset, first, columns, text_column)
        if tokenizer is None:
            raise InputError(
                "model.name_or_path: the LM has no tokenizer, and the data is text. Put its tokenizer beside it, or "
                "use data with input_ids."
            )
        separator = separator_id(arguments.separator, tokenizer, vocab_size)
        cutting = cutting_of_text(text_column, columns, tokenizer, separator, ctx_len, vocab_size)
    if isinstance(dataset, Dataset):
        return _of_all(dataset, columns, cutting, arguments.num_proc, bad_rows)
    dealt = Dealt(cutting)
    return SequenceStream(dataset, cutting.reads, cutting, dealt.of(dataset, columns), bad_rows, dealt)


def _of_all(
    dataset: Dataset, columns: list[str], cutting: Cutting, num_proc: int | None, bad_rows: BadRows
) -> Dataset:
    sequences, tally = cut(dataset, columns, cutting, num_proc)
    bad_rows.add(tally)
    bad_rows.tell()
    if not len(sequences) and cutting.verb == "Tokenizing":
        _refuse_too_few(dataset, cutting, num_proc)
    return sequences


def _refuse_too_few(dataset: Dataset, cutting: Cutting, num_proc: int | None) -> None:
    ctx_len, column = cutting.options["ctx_len"], cutting.options["text_column"]
    texts = dataset[column][:]
    bad = {place for place, _ in bad_texts(texts, column)}
    texts = [text for i, text in enumerate(texts) if i not in bad]
    count = sum(len(document) + 1 for document in tokenize(texts, cutting.options["tokenizer"])) if texts else 0
    if count < ctx_len:
        raise InputError(
            f"The data has {count} tokens, less than one sequence of data.ctx_len = {ctx_len}. Lower "
            "data.ctx_len, or use more data."
        )
    raise InputError(
        f"The data has {count} tokens in {len(dataset)} documents, but no sequence of data.ctx_len = {ctx_len}: "
        f"at most {DOCUMENTS_AT_ONCE} documents are joined, and each of {num_proc or 1} processes joins its own. "
        "Lower data.ctx_len or data.num_proc, or use longer documents."
    )


def _check_enough(sequences: int, arguments: DataArguments) -> None:
    if sequences <= arguments.eval_examples:
        raise InputError(
            f"The data has {sequences} sequences of data.ctx_len = {arguments.sequence_length}, and "
            f"data.eval_examples holds out {arguments.eval_examples}, so that none is left to train on. Lower one "
            "of these two fields, or use more data."
        )


def _check_is_text(
    dataset: Dataset | IterableDataset, first: dict[str, Any], columns: list[str], text_column: str
) -> None:
    """Refuses a column that does not hold text; a single row without text is a bad row."""
    if text_column not in columns:
        raise InputError(
            f"data.text_column: the data has no column {text_column!r}; it has {', '.join(columns)}. Name one of them."
        )
    if not _holds(dataset, text_column, first, lambda value: isinstance(value, str)):
        raise InputError(
            f"data.text_column: column {text_column!r} holds {type(first[text_column]).__name__}, not text. Name "
            "another column, or drop such rows."
        )


def _check_are_ids(dataset: Dataset | IterableDataset, first: dict[str, Any], kept: list[str]) -> None:
    def are_whole(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, int) for one in value)

    for column in kept:
        if not _holds(dataset, column, first, are_whole):
            raise InputError(
                f"The data's column {column!r} does not hold lists of whole numbers. Rename or mend the column."
            )


def _holds(
    dataset: Dataset | IterableDataset, column: str, first: dict[str, Any], is_right: Callable[[Any], bool]
) -> bool:
    """Whether a column may hold the right values, judged by its first row; yes if rows may differ in type."""
    kind = None if dataset.features is None else str(dataset.features.arrow_schema.field(column).type)
    rows_differ = kind is None or "json" in kind.lower()
    return first[column] is None or rows_differ or is_right(first[column])


def _first_row(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    # A stream opens its files only when its first row is read.
    with reading("The data cannot be read", "Check data.path, and what is there."):
        first = next(iter(dataset), None)
    if first is None:
        raise InputError("The data has no rows. Use other data, or another data.split.")
    return first


def _columns(dataset: Dataset | IterableDataset, first: dict[str, Any]) -> list[str]:
    """Returns the names of a dataset's columns; if a stream does not state them, the keys of its first row."""
    return dataset.column_names or list(first)

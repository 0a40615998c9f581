from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from transformers import PreTrainedTokenizerBase

from ..common.errors import InputError, one_line
from ..recipe.arguments import DataArguments
from .sequence_stream import DOCUMENTS_AT_ONCE, SequenceStream
from .sources import open_dataset
from .token_file import TokenFile


@dataclass(frozen=True)
class Cutting:
    """
    How documents become sequences.

    Args:
        function (`Callable[..., dict[str, list]]`): Makes sequences of documents, both by column.
        options (`dict[str, Any]`): What else it is called with.
        reads (`list[str]`): The documents' columns that it needs.
        gives (`list[str]`): The sequences' columns.
        verb (`str`): What it does, in a word.
    """

    function: Callable[..., dict[str, list]]
    options: dict[str, Any]
    reads: list[str]
    gives: list[str]
    verb: str

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """The sequences of some documents."""
        return self.function(rows, **self.options)


def chunk_and_tokenize(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ctx_len: int = 2048,
    text_column: str = "text",
    num_proc: int | None = None,
) -> Any:
    """
    Tokenises documents, joins them with EOS after each, and cuts the result into sequences.

    No token but EOS is added: a BOS would stand in the middle of sequences. Of every 1,000 documents (of a process's
    share, if that is less) what does not fill a last sequence is dropped.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or a dict of them): Rows of text.
        tokenizer (`PreTrainedTokenizerBase`): The LM's tokenizer.
        ctx_len (`int`, defaults to 2048): Tokens in a sequence.
        text_column (`str`, defaults to `"text"`): Column with the text.
        num_proc (`int`, *optional*): Processes; one if not given. Not used when streaming.

    Returns:
        A dataset of the same kind with one column, `input_ids`, of `ctx_len` ids each.

    Raises:
        `InputError`: if there is no such column of text, the tokenizer has no EOS, or there is less than one sequence.
            What is wrong in a stream beyond its first row is raised when it is read.
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        return type(dataset)(
            {split: _pack(rows, tokenizer, ctx_len, text_column, num_proc) for split, rows in dataset.items()}
        )
    return _pack(dataset, tokenizer, ctx_len, text_column, num_proc)


def load_tokens(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> tuple[Any, Any]:
    """
    The sequences that a recipe's `data` describes: for training, shuffled, and held out for evaluation.

    The first `eval_examples` sequences, in the dataset's own order, are held out.

    Args:
        arguments ([`DataArguments`]): What to read.
        tokenizer (`PreTrainedTokenizerBase`): The LM's tokenizer.
        vocab_size (`int`): Ids that the LM knows.

    Returns:
        `tuple`: rows with `input_ids` for training, and for evaluation or None. Both work in a `DataLoader` with
        `collate`.

    Raises:
        `InputError`: if the data cannot be found or read, holds ids that the LM does not know, or is too little.
    """
    sequences: Any
    if arguments.path.endswith(".bin"):
        sequences = TokenFile(arguments.path, arguments.sequence_length, vocab_size, arguments.token_dtype)
    else:
        sequences = _tokenized(open_dataset(arguments), arguments, tokenizer, vocab_size)
    held_out = arguments.eval_examples
    if isinstance(sequences, SequenceStream):
        # A stream's length is not known, but that it goes beyond what is held out is found by reading as far.
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
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> Dataset | SequenceStream:
    dataset = dataset.with_format(None)
    first = _first_row(dataset)
    columns = _columns(dataset, first)
    ctx_len, num_proc = arguments.sequence_length, arguments.num_proc
    if "input_ids" in columns:
        cutting = _cutting_of_ids(first, columns, ctx_len, vocab_size)
        sequences = _map(dataset, columns, cutting, num_proc)
    else:
        cutting = _cutting_of_text(first, columns, tokenizer, ctx_len, arguments.text_column, vocab_size)
        sequences = _packed(dataset, columns, cutting, num_proc)
    return sequences if isinstance(sequences, Dataset) else SequenceStream(dataset, cutting.reads, cutting, sequences)


def _cutting_of_ids(first: dict[str, Any], columns: list[str], ctx_len: int, vocab_size: int) -> Cutting:
    kept: list[str] = [column for column in ("input_ids", "attention_mask") if column in columns]
    for column in kept:
        if not isinstance(first[column], list) or not all(isinstance(value, int) for value in first[column]):
            raise InputError(f"The data's column {column!r} does not hold lists of whole numbers. Rename or mend it.")
    return Cutting(_cut_rows, {"ctx_len": ctx_len, "columns": kept, "vocab_size": vocab_size}, kept, kept, "Cutting")


def _cutting_of_text(
    first: dict[str, Any],
    columns: list[str],
    tokenizer: PreTrainedTokenizerBase,
    ctx_len: int,
    text_column: str,
    vocab_size: int | None,
) -> Cutting:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "The tokenizer has no EOS token to put between documents. Set tokenizer.eos_token, or use data with "
            "input_ids."
        )
    if text_column not in columns:
        raise InputError(
            f"data.text_column: the data has no column {text_column!r}; it has {', '.join(columns)}. Name one of them."
        )
    _check_text([first[text_column]], text_column)
    options = {"tokenizer": tokenizer, "ctx_len": ctx_len, "text_column": text_column, "vocab_size": vocab_size}
    return Cutting(_pack_documents, options, [text_column], ["input_ids"], "Tokenizing")


def _pack(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    ctx_len: int,
    text_column: str,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    first = _first_row(dataset)
    columns = _columns(dataset, first)
    cutting = _cutting_of_text(first, columns, tokenizer, ctx_len, text_column, vocab_size=None)
    return _packed(dataset.with_format(None), columns, cutting, num_proc)


def _packed(
    dataset: Dataset | IterableDataset, columns: list[str], cutting: Cutting, num_proc: int | None
) -> Dataset | IterableDataset:
    packed = _map(dataset, columns, cutting, num_proc)
    if isinstance(packed, Dataset) and not len(packed):
        ctx_len, texts = cutting.options["ctx_len"], dataset[cutting.options["text_column"]][:]
        count = sum(len(document) + 1 for document in _tokenize(texts, cutting.options["tokenizer"]))
        if count < ctx_len:
            raise InputError(
                f"The data has {count} tokens, less than one sequence of data.ctx_len = {ctx_len}. Lower it, or use "
                "more data."
            )
        raise InputError(
            f"The data has {count} tokens in {len(dataset)} documents, but no sequence of data.ctx_len = {ctx_len}: "
            f"at most {DOCUMENTS_AT_ONCE} documents are joined, and each of {num_proc or 1} processes joins its own. "
            "Lower data.ctx_len or data.num_proc, or use longer documents."
        )
    return packed


def _map(
    dataset: Dataset | IterableDataset, columns: list[str], cutting: Cutting, num_proc: int | None
) -> Dataset | IterableDataset:
    # A stream takes neither processes nor a name.
    options = {"num_proc": num_proc, "desc": cutting.verb} if isinstance(dataset, Dataset) else {}
    return dataset.map(
        cutting.function,
        batched=True,
        batch_size=DOCUMENTS_AT_ONCE,
        remove_columns=columns,
        features=_features(cutting.gives),
        fn_kwargs=cutting.options,
        **options,
    )


def _pack_documents(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, ctx_len: int, text_column: str, vocab_size: int | None
) -> dict[str, list]:
    _check_text(rows[text_column], text_column)
    documents = _tokenize(rows[text_column], tokenizer)
    ids = [token for document in documents for token in (*document, tokenizer.eos_token_id)]
    if vocab_size is not None and max(ids) >= vocab_size:
        raise InputError(
            f"The tokenizer gives id {max(ids)}, but the LM knows {vocab_size} ids. Use the tokenizer of the LM."
        )
    return {"input_ids": [ids[i : i + ctx_len] for i in range(0, len(ids) - ctx_len + 1, ctx_len)]}


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: documents longer than the LM's context are cut later, so the tokenizer's warning says nothing. It
    # would also leave a mark in the tokenizer, by which datasets takes it for another one and misses its cache.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _cut_rows(rows: dict[str, list], ctx_len: int, columns: list[str], vocab_size: int) -> dict[str, list]:
    """Rows that are longer than a sequence, in pieces; shorter ones as they are."""
    for ids, *mask in zip(*(rows[column] for column in columns), strict=True):
        if mask and len(mask[0]) != len(ids):
            raise InputError(f"A row of the data has {len(ids)} input_ids, but an attention_mask of {len(mask[0])}.")
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InputError(
                f"The data's input_ids go from {min(ids)} to {max(ids)}, but the LM knows {vocab_size} ids, from 0. "
                "Use data that was made with its tokenizer."
            )
    return {
        column: [row[i : i + ctx_len] for row in rows[column] for i in range(0, len(row), ctx_len)]
        for column in columns
    }


def _check_enough(sequences: int, arguments: DataArguments) -> None:
    if sequences <= arguments.eval_examples:
        raise InputError(
            f"The data has {sequences} sequences of data.ctx_len = {arguments.sequence_length}, and "
            f"data.eval_examples holds out {arguments.eval_examples}, so that none is left to train on. Lower one of "
            "them, or use more data."
        )


def _check_text(texts: list[Any], text_column: str) -> None:
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise InputError(
            f"data.text_column: column {text_column!r} holds {type(wrong[0]).__name__}, not text. Name another "
            "column, or drop such rows."
        )


def _first_row(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    try:
        first = next(iter(dataset), None)
    # A stream opens its files only here, and passes on whatever its builder raises.
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = one_line(error)
        raise InputError(f"The data cannot be read: {reason}. Check data.path, and what is there.") from error
    if first is None:
        raise InputError("The data has no rows. Use other data, or another data.split.")
    return first


def _columns(dataset: Dataset | IterableDataset, first: dict[str, Any]) -> list[str]:
    """Names of a dataset's columns; of a stream that does not state them, those of its first row."""
    return dataset.column_names or list(first)


def _features(columns: list[str]) -> Features:
    """Stated, as they cannot be told from a batch that gives no sequence."""
    return Features({column: List(Value("int8" if column == "attention_mask" else "int32")) for column in columns})

from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .arguments import DataArguments
from .errors import InputError
from .token_file import TokenFile
from .text_sources import open_dataset


# Documents tokenised at once. What is left over from each such batch, less than one sequence, is dropped.
DOCUMENTS_AT_ONCE = 1000
# Sequences among which streamed data is shuffled.
SHUFFLE_BUFFER = 1000


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

    No token but EOS is added: a BOS would stand in the middle of sequences. Of every 1,000 documents what does not fill a
    last sequence is dropped.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Rows of text.
        tokenizer (`PreTrainedTokenizerBase`): The LM's tokenizer.
        ctx_len (`int`, defaults to 2048): Tokens in a sequence.
        text_column (`str`, defaults to `"text"`): Column with the text.
        num_proc (`int`, *optional*): Processes; one if not given.

    Returns:
        A dataset of the same kind with one column, `input_ids`, of `ctx_len` ids each.

    Raises:
        `InputError`: if there is no such column of text, the tokenizer has no EOS, or there is less than one sequence.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no EOS token to put between documents. Set tokenizer.eos_token.")
    _check_text(dataset, text_column)
    mapped = dataset.map(
        _pack_documents,
        batched=True,
        batch_size=DOCUMENTS_AT_ONCE,
        remove_columns=_columns(dataset),
        fn_kwargs={"tokenizer": tokenizer, "ctx_len": ctx_len, "text_column": text_column},
        **({"num_proc": num_proc, "desc": "Tokenizing"} if isinstance(dataset, Dataset) else {}),
    )
    if isinstance(mapped, Dataset) and not len(mapped):
        count = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in dataset[text_column])
        raise InputError(
            f"The data has {count + len(dataset)} tokens, less than one sequence of data.ctx_len = {ctx_len}. Lower it, or "
            "use more data."
        )
    return mapped


def load_tokens(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> tuple[Any, Any]:
    """
    The sequences that a recipe's `data` describes: for training, shuffled, and held out for evaluation.

    The first `eval_examples` sequences, in the dataset's own order, are held out.

    Args:
        arguments ([`DataArguments`]): What to read.
        tokenizer (`PreTrainedTokenizerBase`): The LM's tokenizer.
        vocab_size (`int`): Ids that the LM knows.

    Returns:
        `tuple`: rows with `input_ids` for training, and for evaluation or None. Both work in a `DataLoader` with `collate`.

    Raises:
        `InputError`: if the data cannot be found or read, or there is too little of it.
    """
    if arguments.path.endswith(".bin"):
        sequences = TokenFile(arguments.path, arguments.ctx_len, vocab_size, arguments.token_dtype)
    else:
        sequences = _tokenized(open_dataset(arguments), arguments, tokenizer)
    if isinstance(sequences, IterableDataset):
        return _split_stream(sequences, arguments)
    held_out = arguments.eval_examples
    if len(sequences) <= held_out:
        raise InputError(
            f"The data has {len(sequences)} sequences of {arguments.ctx_len} tokens, and data.eval_examples holds out "
            f"{held_out}, so that none is left to train on. Lower data.eval_examples or data.ctx_len, or use more data."
        )
    train = sequences.select(range(held_out, len(sequences)))
    if arguments.shuffle_seed is not None:
        train = train.shuffle(seed=arguments.shuffle_seed)
    if arguments.max_examples is not None:
        train = train.select(range(min(arguments.max_examples, len(train))))
    return train, sequences.select(range(held_out)) if held_out else None


def collate(rows: list[dict[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """
    A batch of sequences, filled up on the right where they differ in length.

    Args:
        rows (`list[dict]`): Each with `input_ids`, and optionally `attention_mask`.
        pad_token_id (`int`, defaults to 0): What stands where a sequence has ended.

    Returns:
        `dict`: `input_ids` and `attention_mask`, each `(batch, ctx_len)`, long.
    """
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    masks = [
        torch.as_tensor(row["attention_mask"], dtype=torch.long) if "attention_mask" in row else torch.ones_like(one)
        for row, one in zip(rows, ids, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad(masks, batch_first=True, padding_value=0),
    }


def token_mask(batch: dict[str, Tensor], exclude_tokens: Iterable[int]) -> Tensor:
    """
    Which tokens train and are measured: those that are not padding and not excluded.

    Args:
        batch (`dict`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`.
        exclude_tokens (`Iterable[int]`): Ids that are left out.

    Returns:
        `torch.BoolTensor` of shape `(batch, ctx_len)`.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    excluded = torch.tensor(list(exclude_tokens), dtype=ids.dtype, device=ids.device)
    return mask & ~torch.isin(ids, excluded) if len(excluded) else mask


def _tokenized(dataset: Any, arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    columns = _columns(dataset)
    if "input_ids" not in columns:
        return chunk_and_tokenize(
            dataset,
            tokenizer,
            ctx_len=arguments.ctx_len,
            text_column=arguments.text_column,
            num_proc=arguments.num_proc,
        )
    kept = [column for column in ("input_ids", "attention_mask") if column in columns]
    return dataset.map(
        _cut_rows,
        batched=True,
        remove_columns=columns,
        fn_kwargs={"ctx_len": arguments.ctx_len, "columns": kept},
    )


def _split_stream(stream: IterableDataset, arguments: DataArguments) -> tuple[Any, Any]:
    """A stream's length is not known, so what is too short is found when batches are asked for."""
    train = stream.skip(arguments.eval_examples)
    if arguments.shuffle_seed is not None:
        train = train.shuffle(seed=arguments.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
    if arguments.max_examples is not None:
        train = train.take(arguments.max_examples)
    return train, stream.take(arguments.eval_examples) if arguments.eval_examples else None


def _check_text(dataset: Any, text_column: str) -> None:
    columns = _columns(dataset)
    if text_column not in columns:
        raise InputError(
            f"data.text_column: the data has no column {text_column!r}; it has {', '.join(columns)}. Name one of them."
        )
    first = next(iter(dataset.take(1) if isinstance(dataset, IterableDataset) else dataset.select(range(1))), None)
    if first is None:
        raise InputError("The data has no rows.")
    if not isinstance(first[text_column], str):
        raise InputError(
            f"data.text_column: column {text_column!r} holds {type(first[text_column]).__name__}, not text. Name another."
        )


def _columns(dataset: Any) -> list[str]:
    """Names of a dataset's columns; of a stream that does not state them, those of its first row."""
    return dataset.column_names or list(next(iter(dataset), {}))


def _pack_documents(rows: dict[str, list], tokenizer: Any, ctx_len: int, text_column: str) -> dict[str, list]:
    verbosity = transformers_logging.get_verbosity()
    # Documents longer than the LM's context are cut below, so the tokenizer's warning about them says nothing.
    transformers_logging.set_verbosity_error()
    documents = tokenizer(rows[text_column], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    transformers_logging.set_verbosity(verbosity)
    ids = [token for document in documents for token in (*document, tokenizer.eos_token_id)]
    return {"input_ids": [ids[i : i + ctx_len] for i in range(0, len(ids) - ctx_len + 1, ctx_len)]}


def _cut_rows(rows: dict[str, list], ctx_len: int, columns: list[str]) -> dict[str, list]:
    """Rows that are longer than a sequence, in pieces; shorter ones as they are."""
    return {
        column: [row[i : i + ctx_len] for row in rows[column] for i in range(0, len(row), ctx_len)] for column in columns
    }

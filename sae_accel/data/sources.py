"""
Opens the rows that `data.path` names.

A path can be a folder that `save_to_disk` wrote, local files, or a dataset on the Hub. Local files are read by what
they hold, whatever their names are; JSON lines go through a reader of our own that can leave out broken rows.
"""

import glob
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from ..common.errors import InputError
from ..common.hub_requests import hub_requests
from ..recipe.arguments import DataArguments
from .file_kinds import ARROW, CSV, JSON, PARQUET, TEXT, TSV
from .json_lines import JsonLines
from .local_files import LocalFiles, find_files, is_local, what_is_near
from .reading import reading


BUILDERS = {JSON: "json", CSV: "csv", TSV: "csv", PARQUET: "parquet", ARROW: "arrow", TEXT: "text"}
DOCUMENT = "document"


def open_dataset(arguments: DataArguments) -> Dataset | IterableDataset:
    """
    Opens the rows that `data.path` names: a folder from `save_to_disk`, local files, or anything that `load_dataset`
    takes.

    Args:
        arguments ([`DataArguments`]): The recipe's `data`.

    Raises:
        `InputError`: if the rows cannot be read, with the reason.
    """
    path = arguments.path
    is_pattern, is_there = glob.has_magic(path), os.path.exists(path)
    ends = "" if is_there or is_pattern or "data_files" in arguments.load_args else what_is_near(path).strip()
    with reading(f"data.path: {path!r} cannot be loaded", ends):
        if _is_saved(Path(path)):
            return _saved(arguments)
        if (files := find_files(arguments)) is not None:
            return _local(files, arguments)
        if not is_there and is_pattern:
            raise FileNotFoundError(f"no file matches it.{what_is_near(path)}")
        if not is_there and is_local(path) and "://" not in path:
            raise FileNotFoundError("there is no such file or folder")
        options = {"split": arguments.split, "streaming": arguments.streaming, **_sampling(arguments)}
        asks = nullcontext() if os.path.exists(path) else hub_requests(f"loading {path!r}", shows_progress=True)
        with asks:
            return load_dataset(path, arguments.name, **(options | arguments.load_args))


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved(arguments: DataArguments) -> Dataset | IterableDataset:
    rows = load_from_disk(arguments.path)
    if isinstance(rows, DatasetDict):
        if arguments.split not in rows:
            raise InputError(
                f"data.split: {arguments.path!r} has no split {arguments.split!r}; it has {', '.join(rows)}."
            )
        rows = rows[arguments.split]
    elif "[" in arguments.split:
        raise InputError(f"data.split: {arguments.path!r} is one saved split, and a slice of it cannot be taken.")
    return rows.to_iterable_dataset() if arguments.streaming else rows


def _local(files: LocalFiles, arguments: DataArguments) -> Dataset | IterableDataset:
    if files.kind != TEXT and arguments.sample_by != DOCUMENT:
        raise InputError(
            f"data.sample_by: it cuts texts, and {arguments.path!r} holds {files.kind}, where each row is a "
            "document. Remove data.sample_by."
        )
    if arguments.streaming and (hidden := next((file for file in files.files if file.hides_compression), None)):
        if files.kind != JSON or arguments.load_args:
            raise InputError(
                f"data.path: {hidden.path!r} is compressed with {hidden.compression}, and a stream knows that only "
                "from the ending. Rename the file, or set --data.streaming false."
            )
    # A name with `*` or `[` in it must not be read as a pattern.
    paths = {split: [glob.escape(os.path.abspath(f.path)) for f in found] for split, found in files.splits.items()}
    if files.kind == JSON and not arguments.load_args and all(file.columns for file in files.files):
        return _json_lines(files, paths, arguments)
    options: dict[str, Any] = {"split": arguments.split, "streaming": arguments.streaming, "data_files": paths}
    if files.kind == TEXT:
        options |= {"sample_by": arguments.sample_by, "encoding": "utf-8-sig"}
    elif files.kind in (CSV, TSV):
        # An empty cell, or a cell that says "null", is a text.
        options |= {"keep_default_na": False, "sep": "\t" if files.kind == TSV else ","}
    elif files.kind == JSON:
        # Without this, `datasets` parses texts as JSON if texts near them are of another type.
        options["on_mixed_types"] = None
    return load_dataset(BUILDERS[files.kind], **(options | arguments.load_args))


def _json_lines(files: LocalFiles, paths: dict[str, list[str]], arguments: DataArguments) -> Dataset | IterableDataset:
    columns = {column: None for file in files.files for column in file.columns}
    text_column = None if "input_ids" in columns else arguments.text_column
    if text_column is not None and text_column not in columns:
        raise InputError(
            f"data.text_column: the data has no column {text_column!r}; it has {', '.join(columns)}. Name one of them."
        )
    builder = JsonLines(data_files=paths, text_column=text_column, masks="attention_mask" in columns)
    if arguments.streaming:
        return builder.as_streaming_dataset(arguments.split)
    builder.download_and_prepare()
    return builder.as_dataset(arguments.split)


def _sampling(arguments: DataArguments) -> dict[str, str]:
    """Returns `sample_by` for `datasets`, unless it is the default; `datasets` refuses it where it has no meaning."""
    return {} if arguments.sample_by == DOCUMENT else {"sample_by": arguments.sample_by}

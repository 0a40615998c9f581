import glob
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..common.errors import InputError, one_line
from ..recipe.arguments import DataArguments


# Local files by their ending; any other ending is plain text, and each file is one document.
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}

COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst", ".lz4"}


def open_dataset(arguments: DataArguments) -> Dataset | IterableDataset:
    """
    The rows that `data.path` names: a folder saved by `save_to_disk`, local files, or what `load_dataset` takes.

    Args:
        arguments ([`DataArguments`]): The recipe's `data`.

    Raises:
        `InputError`: with the reason, if they cannot be read.
    """
    path = arguments.path
    try:
        if _is_saved(Path(path)):
            return _saved(arguments)
        if files := sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file()):
            return _local_files(files, arguments)
        options = {"split": arguments.split, "streaming": arguments.streaming, **arguments.load_args}
        return load_dataset(path, arguments.name, **options)
    except InputError:
        raise
    # load_dataset passes on whatever its builders raise; these are what wrong arguments cause.
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, DatasetGenerationError) as error:
        reason = one_line(error.__cause__ or error)
        raise InputError(f"data.path: {path!r} cannot be loaded: {reason}") from error


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
        raise InputError(f"data.split: {arguments.path!r} is one saved split; slices are not taken of it.")
    return rows.to_iterable_dataset() if arguments.streaming else rows


def _local_files(files: list[str], arguments: DataArguments) -> Dataset | IterableDataset:
    # The ending before that of a compression, which datasets undoes itself.
    endings = [ending for ending in Path(files[0]).suffixes if ending not in COMPRESSIONS]
    builder = BUILDERS.get(endings[-1] if endings else "")
    options: dict[str, Any] = {"split": arguments.split, "streaming": arguments.streaming, "data_files": files}
    if builder is None:
        builder, options["sample_by"] = "text", "document"
    return load_dataset(builder, **(options | arguments.load_args))

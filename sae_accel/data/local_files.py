"""
Finds the local files that `data.path` names: one file, the files that match a pattern, or all files in a folder.

A folder of data often holds other files too, such as checksums, hidden files or a README. Names and first bytes tell
them from data; the run prints which files it leaves out. The files that remain must be of one kind. A folder that says
itself how it must be loaded, like a copy of a dataset on the Hub, is left to `datasets`.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from datasets.config import REPOCARD_FILENAME, REPOYAML_FILENAME
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from huggingface_hub.repocard import metadata_load

from ..common.errors import InputError, near
from ..processes.agreement import say
from ..recipe.arguments import DataArguments
from .file_kinds import ENDINGS, IDS, OTHER, TEXT, FileKind, ending_of, kind_of


# Files beside data that are not data: of Spark, Hive, Hadoop and datasets, checksums, locks and partial downloads.
_NO_DATA = re.compile(
    r"[._].*|cache-[0-9a-f]+.*\.arrow|.*\.(crc|lock|md5|sha1|sha256|sha512|tmp|part|incomplete)|(md5|sha\d+)sums?(\.txt)?|dataset_infos?\.json"
    r"|dataset_dict\.json|state\.json|manifest\.json|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
# Texts that describe tables beside them. Among texts they are data like the others.
_ABOUT_TABLES = re.compile(r"(readme|licen[cs]e|notice|changelog|citation|dataset_?card)\b.*", re.IGNORECASE)
_NAMED = 4


class LocalFiles(NamedTuple):
    """
    Local files of one kind, by split.

    Args:
        kind (`str`): What the files hold, one of the kinds of `file_kinds`.
        splits (`dict[str, list[FileKind]]`): The files of each split, in the order of their paths.
    """

    kind: str
    splits: dict[str, list[FileKind]]

    @property
    def files(self) -> list[FileKind]:
        """The files of all splits."""
        return [file for files in self.splits.values() for file in files]


def find_files(arguments: DataArguments) -> LocalFiles | None:
    """
    Finds the files that `data.path` names, leaves out files that hold no data, and prints their names.

    Args:
        arguments ([`DataArguments`]): The recipe's `data`.

    Returns:
        [`LocalFiles`] or `None`: None if `datasets` must load the path: a folder that says how it is loaded, a folder
        without a readable file, or a path that is not on this machine.

    Raises:
        `InputError`: if the files are of several kinds.
        `ValueError`: if a file is of no kind that can be read.
    """
    path, options = arguments.path, arguments.load_args
    is_utf8 = "encoding" not in options
    if os.path.isfile(path):
        return _of_one_kind(path, {"train": [kind_of(path, is_utf8)]})
    if os.path.isdir(path):
        if arguments.name is not None or {"data_files", "data_dir"} & set(options) or _is_configured(Path(path)):
            return None
        return _of_folder(path, is_utf8)
    matching = glob.glob(path, recursive=True) if glob.has_magic(path) else []
    found = _data_among(path, sorted(one for one in matching if os.path.isfile(one)), is_utf8)
    return _of_one_kind(path, {"train": found}) if found else None


def what_is_near(path: str) -> str:
    """Returns a sentence, after a blank, on the files next to a path that does not exist; empty if there are none."""
    parent, name = os.path.split(path)
    if glob.has_magic(parent) or not os.path.isdir(parent or "."):
        return ""
    # A path without a folder may mean a dataset on the Hub, so only names that are like it are shown.
    names = sorted(entry for entry in os.listdir(parent or ".") if not entry.startswith(".") and entry != name)
    if not parent or not names:
        return near(name, names)
    return f"{near(name, names)} In {parent!r} there is {_named(names)}."


def is_local(path: str) -> bool:
    """Whether a path can only mean a file or folder on this machine, even if it does not exist."""
    return bool(path.startswith(("/", "./", "../")) or path.count("/") > 1 or ending_of(path) in ENDINGS)


def _of_folder(folder: str, is_utf8: bool) -> LocalFiles | None:
    inside = (os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    found = _data_among(folder, sorted(inside), is_utf8)
    if not any(file.kind != OTHER for file in found):
        return None
    by_split = _splits(folder)
    if by_split is None:
        return _of_one_kind(folder, {"train": found})
    splits = {split: [file for file in found if os.path.abspath(file.path) in by_split[split]] for split in by_split}
    if others := [file.path for file in found if not any(file in files for files in splits.values())]:
        _say_left_out(folder, others, f"because other files are named for the splits {', '.join(by_split)}")
    return _of_one_kind(folder, {split: files for split, files in splits.items() if files})


def _data_among(where: str, paths: list[str], is_utf8: bool) -> list[FileKind]:
    """Returns the files that hold data, by their names and by their first bytes."""
    # A pattern that begins with a dot or an underscore asks for hidden files.
    asked = os.path.basename(where)[:1] in ("_", ".")
    base = "" if glob.has_magic(where) and not os.path.isdir(where) else where
    kept, left_out = list[str](), list[str]()
    for path in paths:
        parts = Path(os.path.relpath(path, base)).parts if base else (os.path.basename(path),)
        is_data = asked or not (_NO_DATA.fullmatch(parts[-1]) or any(part[0] in "._" for part in parts))
        (kept if is_data and os.path.getsize(path) else left_out).append(path)
    found = [kind_of(path, is_utf8) for path in kept]
    tables = {file.kind for file in found} - {TEXT, OTHER}
    about = [f for f in found if tables and f.kind == TEXT and _ABOUT_TABLES.fullmatch(os.path.basename(f.path))]
    # A file with a data ending that holds no data is refused; a picture beside texts is left out.
    strange = [f for f in found if f.kind == OTHER and not _claims_data(f)]
    if len(strange) + len(about) == len(found):
        strange = []
    left_out += [file.path for file in (*about, *strange)]
    if left_out and len(left_out) < len(paths):
        _say_left_out(where, sorted(left_out), "because they hold no data")
    dropped = set(left_out)
    return [file for file in found if file.path not in dropped]


def _claims_data(file: FileKind) -> bool:
    return ending_of(file.path) in ENDINGS or file.compression is not None


def _of_one_kind(path: str, splits: dict[str, list[FileKind]]) -> LocalFiles:
    files = [file for found in splits.values() for file in found]
    if wrong := next((file for file in files if file.kind == OTHER), None):
        which = "it" if wrong.path == path else repr(wrong.path)
        raise ValueError(
            f"{which} cannot be read as data, since it {wrong.why}. Allowed are text in UTF-8, JSON lines, CSV, TSV, "
            "Parquet, Arrow, and a .bin of token ids"
        )
    if ids := next((file for file in files if file.kind == IDS), None):
        raise InputError(f"data.path: {ids.path!r} holds token ids. Set data.path to this one file.")
    kinds = Counter(file.kind for file in files)
    if len(kinds) > 1:
        examples = {kind: os.path.basename(next(f.path for f in files if f.kind == kind)) for kind in kinds}
        words = ", ".join(f"{count} of {kind} ({examples[kind]})" for kind, count in kinds.most_common())
        raise InputError(
            f"data.path: {path!r} holds files of several kinds: {words}. Name the files of one kind by a pattern, "
            f"such as {_pattern(path, examples[kinds.most_common(1)[0][0]])!r}."
        )
    if not files:
        raise InputError(f"data.path: {path!r} holds no data. Name a file, a folder or a pattern of files.")
    return LocalFiles(next(iter(kinds)), splits)


def _pattern(path: str, example: str) -> str:
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    return os.path.join(folder, f"*{''.join(Path(example).suffixes[-2:]) or example}")


def _is_configured(folder: Path) -> bool:
    """Whether a folder says itself how it is loaded, as copies of datasets on the Hub do."""
    if (folder / REPOYAML_FILENAME).is_file() or (folder / f"{folder.name}.py").is_file():
        return True
    card = folder / REPOCARD_FILENAME
    about = (metadata_load(card) or {}) if card.is_file() else {}
    return bool({"configs", "dataset_info"} & set(about))


def _splits(folder: str) -> dict[str, set[str]] | None:
    """Returns the files of each split, if names in the folder are names of splits for `datasets`."""
    base = glob.escape(os.path.abspath(folder))
    try:
        patterns = get_data_patterns(base)
    except (EmptyDatasetError, FileNotFoundError):
        return None
    if [list(found) for found in patterns.values()] == [["**"]]:
        return None
    found = DataFilesDict.from_patterns(patterns, base_path=base)
    return {str(split): {os.path.abspath(path) for path in paths} for split, paths in found.items()}


def _say_left_out(where: str, paths: Iterable[str], why: str) -> None:
    base = where if os.path.isdir(where) else os.path.dirname(where)
    names = [os.path.relpath(path, base) if base and not glob.has_magic(base) else path for path in paths]
    say(f"data.path: {where!r} is read without {_named(names)}, left out {why}.")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

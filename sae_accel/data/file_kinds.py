"""
Finds out what a local file holds: JSON, CSV, TSV, Parquet, Arrow, text, token ids, or something else.

Names of data files are often wrong or say nothing, so the first bytes decide. They show Parquet, Arrow, archives and
compressions by their magic numbers, and JSON by its first characters. The ending decides only between kinds of text
that look alike, such as CSV and plain text, and for token ids (`.bin`), which have no sign of their own in their
bytes.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from datasets.utils.file_utils import COMPRESSION_EXTENSION_TO_PROTOCOL

from ..common.errors import InputError, one_line


JSON, CSV, TSV, PARQUET, ARROW = "JSON", "CSV", "TSV", "Parquet", "Arrow"
TEXT, IDS, OTHER = "text", "token ids", "something else"
# The kind by ending, in small letters. Any other ending says nothing.
ENDINGS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), JSON),
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), TEXT),
    ".bin": IDS,
}
# The kind by first bytes. The last one begins a stream of Arrow, which has no name in it.
MAGIC = {b"PAR1": PARQUET, b"ARROW1": ARROW, b"\xff\xff\xff\xff": ARROW}
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
# The package that reads a compression which Python does not read itself.
_READERS = {"zstd": "zstandard", "lz4": "lz4"}
_ARCHIVES = {b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"Rar!": "rar", b"7z\xbc\xaf\x27\x1c": "7z"}
_LOOKED_AT = 2**16
# Bytes that are read at most to find the end of the first line.
_LONGEST_LINE = 2**26
_BEGINS_AN_OBJECT = re.compile(r'\{\s*("(?:[^"\\]|\\.)*"\s*:|\})')
_BEGINS_A_LIST = re.compile(r'\[\s*(\{\s*"|")')


class FileKind(NamedTuple):
    """
    The kind of a file, and how to read it.

    Args:
        path (`str`): The file.
        kind (`str`): One of `JSON`, `CSV`, `TSV`, `PARQUET`, `ARROW`, `TEXT`, `IDS` and `OTHER`.
        compression (`str`, *optional*): The compression of the file, by its name in fsspec.
        columns (`tuple[str, ...]`): The keys of the first rows, for JSON lines and for a list of objects in JSON;
            empty for every other kind.
        why (`str`): Why a file of kind `OTHER` cannot be read, as a clause that follows "it".
    """

    path: str
    kind: str
    compression: str | None = None
    columns: tuple[str, ...] = ()
    why: str = ""

    @property
    def hides_compression(self) -> bool:
        """Whether the file is compressed but its ending says otherwise; a stream trusts the ending."""
        ending = Path(self.path).suffix.lower().lstrip(".")
        return self.compression is not None and COMPRESSION_EXTENSION_TO_PROTOCOL.get(ending) != self.compression


def kind_of(path: str, is_utf8: bool = True) -> FileKind:
    """
    Finds out what a file holds from its first bytes and its ending.

    Args:
        path (`str`): The file.
        is_utf8 (`bool`, defaults to `True`): Whether texts are in UTF-8. If not, the ending alone tells a text in
            another encoding.

    Raises:
        `InputError`: if the file cannot be read, or only with a package that is not installed.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        compression = next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)
        if compression in _READERS and find_spec(_READERS[compression]) is None:
            raise InputError(
                f"data.path: {path!r} is compressed with {compression}, which needs the package "
                f"{_READERS[compression]}. Install it, or unpack the file."
            )
        with fsspec.open(path, "rb", compression=compression) as file:
            head = file.read(_LOOKED_AT)
            if b"\n" not in head and _is_json(_text_of(head) or ""):
                head += file.readline(_LONGEST_LINE)
    # Each library raises errors of its own for a file that is cut off or damaged.
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"data.path: {path!r} cannot be read: {one_line(error)}.") from error
    return _kind(path, head, compression, is_utf8)


def ending_of(path: str) -> str:
    """Returns the ending that says what a file holds, in small letters: `.jsonl` for `a.JSONL.gz`."""
    name = Path(path)
    if name.suffix.lower().lstrip(".") in COMPRESSION_EXTENSION_TO_PROTOCOL:
        name = name.with_suffix("")
    return name.suffix.lower()


def _kind(path: str, head: bytes, compression: str | None, is_utf8: bool) -> FileKind:
    stated = ENDINGS.get(ending_of(path))
    if stated == IDS:
        return FileKind(path, IDS, compression)
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return FileKind(path, kind, compression)
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return FileKind(path, OTHER, compression, why=f"is a {name} archive, which must be unpacked")
    if head[257:262] == b"ustar":
        return FileKind(path, OTHER, compression, why="is a tar archive, which must be unpacked")
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        return FileKind(path, OTHER, compression, why="is empty")
    if stated in (PARQUET, ARROW) and not _is_json(_text_of(head) or ""):
        return FileKind(path, OTHER, compression, why=f"does not hold {stated}, although its name says so")
    text = _text_of(head)
    if text is None and not is_utf8:
        return FileKind(path, stated or TEXT, compression)
    if text is None:
        what = "UTF-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "bytes that are not UTF-8"
        which = " (set --data.load_args.encoding NAME)" if stated in (TEXT, JSON, CSV, TSV) else ""
        return FileKind(path, OTHER, compression, why=f"holds {what}{which}")
    if (columns := _columns(text)) is not None:
        return FileKind(path, JSON, compression, columns)
    if stated == JSON and not text.lstrip().startswith(("{", "[")):
        return FileKind(path, OTHER, compression, why="does not hold JSON objects, although its name says so")
    return FileKind(path, stated or TEXT, compression)


def _text_of(head: bytes) -> str | None:
    """Decodes the first bytes as text, without a last character that is cut off; None if they are no text."""
    if b"\0" in head:
        return None
    for end in range(len(head), max(-1, len(head) - 4), -1):
        try:
            return head[:end].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if error.start < end - 3:
                # In JSON lines, a row in another encoding is a bad row and not another kind of file.
                return head.decode("utf-8-sig", "replace") if _is_json(head[:512].decode("utf-8", "replace")) else None
    return None


def _is_json(text: str) -> bool:
    text = text.lstrip("\ufeff \t\r\n")
    return bool(_BEGINS_AN_OBJECT.match(text) or _BEGINS_A_LIST.match(text))


def _columns(text: str) -> tuple[str, ...] | None:
    """Returns the keys of the first rows if they are JSON: empty for a list of strings, None if they are not JSON."""
    if not _is_json(text):
        return None
    text = text.lstrip()
    if text.startswith("["):
        rows = _rows_of_list(text)
        return tuple(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)) if rows else None
    rows = [row for line in text.split("\n") if isinstance(row := _parsed(line), dict)]
    # This skips a line that is broken or cut off here; the reader reports broken lines.
    return tuple(dict.fromkeys(key for row in rows for key in row)) if rows else None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _rows_of_list(text: str) -> list:
    """Returns the first rows of a JSON list, as far as they are complete."""
    decoder, rows, place = json.JSONDecoder(), list[Any](), 1
    while True:
        place = len(text) - len(text[place:].lstrip(" \t\r\n,"))
        try:
            row, place = decoder.raw_decode(text, place)
        except ValueError:
            return rows
        rows.append(row)

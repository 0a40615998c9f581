"""
Reads JSON lines in which some rows may be broken, and keeps every good row as it is.

The JSON reader of `datasets` finds one type for a whole column, so one odd row changes the rows near it. This builder
states the types first. It reads 10 MB of lines at once with pyarrow. If pyarrow refuses the piece, Python parses it
row by row: a bad row becomes null, and the column `WHY` holds the reason.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.json
from datasets import Features, List, Value

from ..common.errors import one_line
from .bad_rows import WHY, why_no_ids, why_no_mask, why_no_text
from .file_kinds import kind_of


# Bytes of a file that are read at once.
_PIECE = 10 * 2**20


@dataclass
class JsonLinesConfig(datasets.BuilderConfig):
    """
    The keys that are read from each row.

    Args:
        text_column (`str`, *optional*): The key of the row's text; `input_ids` are read if it is not given.
        masks (`bool`, defaults to `False`): Whether `attention_mask` is read too, with `input_ids`.
    """

    text_column: str | None = None
    masks: bool = False

    @property
    def types(self) -> dict[str, Any]:
        """The types of the columns; they do not depend on the rows."""
        if self.text_column is not None:
            return {self.text_column: Value("string")}
        return {name: List(Value("int64")) for name in ("input_ids", *(("attention_mask",) if self.masks else ()))}


class JsonLines(datasets.ArrowBasedBuilder):
    """
    Reads local files of JSON lines, or of JSON lists, compressed or not. A bad row becomes null, with the reason in
    the column `WHY`.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = JsonLinesConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=Features(self.config.types | {WHY: Value("string")}))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = self.config.data_files
        return [datasets.SplitGenerator(name=split, gen_kwargs={"files": list(files[split])}) for split in files]

    def _generate_shards(self, files: list[str]) -> Iterator[str]:
        yield from files

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[tuple[int, int], pyarrow.Table]]:
        for number, path in enumerate(files):
            try:
                for i, table in enumerate(self._tables(path)):
                    yield (number, i), table
            except (OSError, EOFError, ValueError) as error:
                raise ValueError(f"{path}: {one_line(error)}") from error

    def _tables(self, path: str) -> Iterator[pyarrow.Table]:
        with fsspec.open(path, "rb", compression=kind_of(path).compression) as file:
            first, passed = True, 0
            while piece := file.read(_PIECE):
                if not piece.endswith(b"\n"):
                    piece += file.readline()
                if first:
                    piece = piece.removeprefix(b"\xef\xbb\xbf")
                    if piece.lstrip().startswith(b"["):
                        yield from self._of_list(json.loads((piece + file.read()).decode("utf-8", "surrogateescape")))
                        return
                first = False
                if piece.strip():
                    yield self._fast(piece) or self._of_rows(_parsed(piece, passed))
                passed += piece.count(b"\n")

    def _fast(self, piece: bytes) -> pyarrow.Table | None:
        """Reads some lines with pyarrow; None if one of them is neither good nor null."""
        schema = pyarrow.schema([field for field in self._schema() if field.name != WHY])
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        # A block must hold the longest line.
        block = pyarrow.json.ReadOptions(block_size=max(len(piece), 2**20))
        try:
            table = pyarrow.json.read_json(io.BytesIO(piece), read_options=block, parse_options=options)
            table.validate(full=True)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
            return None
        return table.append_column(WHY, pyarrow.nulls(len(table), pyarrow.string())).select(self._schema().names)

    def _of_list(self, rows: list[Any]) -> Iterator[pyarrow.Table]:
        named = [{"text": row} if isinstance(row, str) else row for row in rows]
        for start in range(0, len(named), 10_000):
            yield self._of_rows(named[start : start + 10_000])

    def _of_rows(self, rows: list[Any]) -> pyarrow.Table:
        columns: dict[str, list] = {name: [] for name in self._schema().names}
        for row in rows:
            why = self._why(row)
            for name in self.config.types:
                columns[name].append(None if why else row.get(name))
            columns[WHY].append(why)
        return pyarrow.table(columns, schema=self._schema())

    def _why(self, row: Any) -> str | None:
        if not isinstance(row, dict):
            return f"which is not a JSON object but {type(row).__name__}"
        if (column := self.config.text_column) is not None:
            return why_no_text(row.get(column), column)
        ids, mask = row.get("input_ids"), row.get("attention_mask")
        if (why := why_no_ids(ids)) or ids is None:
            return why
        if ids and not -(2**63) <= min(ids) <= max(ids) < 2**63:
            return "whose input_ids hold a number of more than 64 bits"
        return why_no_mask(mask, ids) if self.config.masks else None

    def _schema(self) -> pyarrow.Schema:
        return self.info.features.arrow_schema


def _parsed(piece: bytes, passed: int) -> list[Any]:
    """Parses some lines; `passed` is the number of lines before them in the file."""
    rows = []
    for number, line in enumerate(piece.split(b"\n"), passed + 1):
        if line.strip():
            try:
                # Bytes that are not UTF-8 become surrogates, and these mark the row as bad.
                rows.append(json.loads(line.decode("utf-8", "surrogateescape")))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}, at character {error.colno}") from error
    return rows

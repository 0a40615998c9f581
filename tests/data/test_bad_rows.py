"""Rows of which no sequence can be made."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from words import VOCAB, ids_by_hand, load, make_texts, make_tokenizer, rows_of

from sae_accel.common.errors import InputError
from sae_accel.data import cutting, sequence_stream
from sae_accel.data.tokens import chunk_and_tokenize


TEXTS = make_texts(300)
IDS = [[i % VOCAB, 1, 2, 3] for i in range(300)]
STREAMING = pytest.mark.parametrize("streaming", [False, True])
AT = 250
# By what stands in the row, what is said of it.
BAD_TEXTS = {
    "null": "whose text is null",
    "5": "whose text is a number, not text",
    "2.5": "whose text is a number with a point, not text",
    "true": "whose text is true or false, not text",
    '["w1"]': "whose text is a list, not text",
    '{"w1": 1}': "whose text is an object, not text",
    r'"w1 \ud800 w2"': "whose text holds half of a surrogate pair",
    r'"w1 \udc00\ud800 w2"': "whose text holds half of a surrogate pair",
}
BAD_IDS = {
    "null": "whose input_ids are null",
    "7": "whose input_ids are a number, not a list",
    '"w1"': "whose input_ids are text, not a list",
    "[1, null]": "whose input_ids hold null, not only whole numbers",
    "[1, 2.5]": "whose input_ids hold a number with a point, not only whole numbers",
    "[true, 1]": "whose input_ids hold true or false, not only whole numbers",
    '["w1"]': "whose input_ids hold text, not only whole numbers",
    "[[1]]": "whose input_ids hold a list, not only whole numbers",
    "[1, -1]": f"whose input_ids go from -1 to 1, but the LM knows {VOCAB} ids",
    f"[0, {VOCAB}]": f"whose input_ids go from 0 to {VOCAB}, but the LM knows {VOCAB} ids",
    str([2**80]): "whose input_ids hold a number of more than 64 bits",
}
BAD_MASKS = {
    "null": "whose attention_mask is null",
    "1": "whose attention_mask is a number, not a list",
    "[1, 1, 1]": "which has 4 input_ids, but an attention_mask of 3",
    "[1, 1, 1, 2]": "whose attention_mask holds values other than 0 and 1",
    "[1, 1, 1, null]": "whose attention_mask holds values other than 0 and 1",
    "[1, 1, 0.5, 1]": "whose attention_mask holds values other than 0 and 1",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # So that bad rows lie in other blocks than the first.
    for module in (cutting, sequence_stream):
        monkeypatch.setattr(module, "DOCUMENTS_AT_ONCE", 100)
    return tmp_path / "here"


def write(rows: list[str], name: str = "a.jsonl") -> str:
    Path(name).write_text("\n".join(rows))
    return name


def text_rows() -> list[str]:
    return [json.dumps({"text": text}) for text in TEXTS]


def id_rows() -> list[str]:
    return [json.dumps({"input_ids": ids, "attention_mask": [1] * 4}) for ids in IDS]


def read(path: str, **options):
    return load(path, **{"ctx_len": 12, "eval_examples": 0, "shuffle_seed": None} | options)[0]


def without(values: list, *places: int) -> list:
    return [value for i, value in enumerate(values) if i not in places]


def packed(texts_by_block: list[list[str]]) -> list[list[int]]:
    blocks = [ids_by_hand(texts) for texts in texts_by_block]
    return [ids[i : i + 12] for ids in blocks for i in range(0, len(ids) - 11, 12)]


def blocks(*bad: int) -> list[list[str]]:
    return [without(TEXTS, *bad)[start : start + 100] for start in (0, 100)] + [without(TEXTS, *bad)[200:]]


def told(train, capsys) -> str:
    """What is said, of a stream at the end of a run."""
    if hasattr(train, "bad_rows"):
        train.bad_rows.tell()
    said = re.findall("sae_accel: (.*left out.*)", capsys.readouterr().err)
    assert len(said) <= 1
    return said[0] if said else ""


def check(path: str, expected: list, words: str, streaming: bool, capsys, **options) -> None:
    """The row is left out and told of, ends a run that is to stop, and is one too many where none may be."""
    train = read(path, streaming=streaming, **options)
    assert rows_of(train) == expected
    of = "the 300 that were read" if streaming else "the data"
    assert told(train, capsys).startswith(f"1 row of {of} was left out (0.33 %): it is row {AT}, {words}")
    for limits, begins in (
        ({"bad_rows": "stop"}, f"data.bad_rows: it is stop, and row {AT} of the data cannot be used, {words}"),
        ({"max_bad_rows": 0}, "data.max_bad_rows: 1 of 300 rows of the data cannot be used, which is 0.33 %"),
        ({"max_bad_rows": 0.003}, f"the first is row {AT}, {words}"),
    ):
        with pytest.raises(InputError, match=re.escape(begins)) as raised:
            list(read(path, streaming=streaming, **options | limits))
        assert "\n" not in str(raised.value)
    assert rows_of(read(path, streaming=streaming, **options, max_bad_rows=1)) == expected


@STREAMING
@pytest.mark.parametrize(("value", "words"), BAD_TEXTS.items())
def test_a_text_that_is_none_is_left_out(value, words, streaming, capsys):
    rows = text_rows()
    rows[AT] = f'{{"text": {value}}}'
    check(write(rows), packed(blocks(AT)), words, streaming, capsys)


@STREAMING
@pytest.mark.parametrize("row", ['{"body": "w1"}', "5", '"w1"', "[]"])
def test_a_row_without_a_text_is_left_out(row, streaming, capsys):
    rows = text_rows()
    rows[AT] = row
    words = "whose text is null" if row.startswith("{") else "which is not a JSON object"
    check(write(rows), packed(blocks(AT)), words, streaming, capsys)


@STREAMING
def test_bytes_that_are_no_text_are_left_out(streaming, capsys):
    rows = [row.encode() for row in text_rows()]
    rows[AT] = b'{"text": "w\xe4rter"}'
    Path("a.jsonl").write_bytes(b"\n".join(rows))
    check("a.jsonl", packed(blocks(AT)), "whose text holds half of a surrogate pair, or bytes", streaming, capsys)


@STREAMING
@pytest.mark.parametrize(("value", "words"), BAD_IDS.items())
def test_ids_that_are_none_are_left_out(value, words, streaming, capsys):
    rows = id_rows()
    rows[AT] = f'{{"input_ids": {value}, "attention_mask": [1, 1]}}'
    check(write(rows), without(IDS, AT), words, streaming, capsys)


@STREAMING
@pytest.mark.parametrize(("value", "words"), BAD_MASKS.items())
def test_masks_that_are_none_are_left_out(value, words, streaming, capsys):
    rows = id_rows()
    rows[AT] = f'{{"input_ids": [1, 2, 3, 4], "attention_mask": {value}}}'
    check(write(rows), without(IDS, AT), words, streaming, capsys)


@STREAMING
def test_rows_of_parquet_are_left_out(streaming, capsys):
    Dataset.from_dict({"text": [None if i == AT else text for i, text in enumerate(TEXTS)]}).to_parquet("a.parquet")
    check("a.parquet", packed(blocks(AT)), "whose text is null", streaming, capsys)
    capsys.readouterr()
    rows = {"input_ids": [None if i == AT else ids for i, ids in enumerate(IDS)], "attention_mask": [[1] * 4] * 300}
    Dataset.from_dict(rows).to_parquet("b.parquet")
    check("b.parquet", without(IDS, AT), "whose input_ids are null", streaming, capsys)
    capsys.readouterr()
    rows["input_ids"][AT], rows["attention_mask"][AT] = IDS[AT], [1] * 3
    Dataset.from_dict(rows).to_parquet("c.parquet")
    check("c.parquet", without(IDS, AT), "which has 4 input_ids, but an attention_mask of 3", streaming, capsys)


@STREAMING
def test_empty_rows_are_not_bad(streaming, capsys):
    rows = text_rows()
    rows[AT] = '{"text": ""}'
    train = read(write(rows), streaming=streaming, bad_rows="stop")
    texts = [*TEXTS[:AT], "", *TEXTS[AT + 1 :]]
    assert rows_of(train) == packed([texts[:100], texts[100:200], texts[200:]])
    rows = id_rows()
    rows[AT] = '{"input_ids": [], "attention_mask": []}'
    train = read(write(rows, "b.jsonl"), streaming=streaming, bad_rows="stop")
    assert rows_of(train) == without(IDS, AT) and told(train, capsys) == ""


def test_the_count_is_right_where_a_map_comes_out_of_the_cache_and_on_several_processes(capsys):
    rows = text_rows()
    rows[3] = rows[200] = '{"text": null}'
    path = write(rows)
    for num_proc in (None, None, 2, 2):
        train = read(path, num_proc=num_proc)
        assert told(train, capsys) == (
            "2 rows of the data were left out (0.67 %): the first is row 3, whose text is null."
        )
    one, other = without(TEXTS, 3, 200)[:149], without(TEXTS, 3, 200)[149:]
    # Each of two processes has blocks of 100 rows of its own.
    assert rows_of(train) == packed([one[:99], one[99:], other[:99], other[99:]])


def test_a_block_of_bad_rows_alone_is_left_out(capsys):
    rows = text_rows()
    rows[100:200] = ['{"text": null}'] * 100
    for streaming in (False, True):
        train = read(write(rows), streaming=streaming, max_bad_rows=100)
        assert rows_of(train) == packed([TEXTS[:100], TEXTS[200:]])
        assert "100 rows" in told(train, capsys)


def test_a_share_is_judged_once_a_block_has_been_read(capsys):
    rows = text_rows()
    rows[0] = '{"text": null}'
    assert len(rows_of(read(write(rows), streaming=True))) > 200
    rows[1] = rows[0]
    with pytest.raises(InputError, match="2 of 100 rows of the data cannot be used, which is 2 %, more than 1 %"):
        read(write(rows), streaming=True)


def test_texts_near_one_that_is_none_stay_as_they_are(monkeypatch):
    """`datasets` makes JSON of every text that it reads together with a number, where it began with texts."""
    monkeypatch.setattr("sae_accel.data.json_lines._PIECE", 2000)
    rows = text_rows()
    rows[AT] = '{"text": 5}'
    for streaming in (False, True):
        assert rows_of(read(write(rows), streaming=streaming)) == packed(blocks(AT))


def test_other_columns_may_hold_anything():
    rows = [json.dumps({"text": text, "meta": [5, "x", None, {"a": 1}][i % 4]}) for i, text in enumerate(TEXTS)]
    for streaming in (False, True):
        assert rows_of(read(write(rows), streaming=streaming, bad_rows="stop")) == packed(blocks())


@STREAMING
def test_a_line_that_is_no_json_is_named_with_its_file(streaming):
    rows = text_rows()
    rows[AT] = '{"text": "w1'
    write(text_rows(), "a.jsonl"), write(rows, "b.jsonl")
    with pytest.raises(InputError, match=rf"b.jsonl: line {AT + 1} is not JSON") as raised:
        list(read("*.jsonl", streaming=streaming))
    assert "\n" not in str(raised.value)


def test_rows_of_a_generator_are_left_out():
    def rows():
        for i, text in enumerate(TEXTS):
            yield {"text": "w1 \ud800" if i == AT else text}

    stream = IterableDataset.from_generator(rows)
    assert rows_of(chunk_and_tokenize(stream, make_tokenizer(), ctx_len=12)) == packed(blocks(AT))


def test_a_dataset_of_others_is_told_of_and_has_a_limit(capsys):
    texts = [None if i == AT else text for i, text in enumerate(TEXTS)]
    found = chunk_and_tokenize(Dataset.from_dict({"text": texts}), make_tokenizer(), ctx_len=12)
    assert rows_of(found) == packed(blocks(AT)) and found.column_names == ["input_ids"]
    assert f"it is row {AT}, whose text is null" in capsys.readouterr().err
    with pytest.raises(InputError, match="data.max_bad_rows: 4 of 300 rows"):
        chunk_and_tokenize(Dataset.from_dict({"text": [None] * 4 + TEXTS[4:]}), make_tokenizer(), ctx_len=12)


def test_data_of_bad_rows_alone_is_refused():
    for streaming in (False, True):
        with pytest.raises(InputError, match="data.max_bad_rows: 20 of 20 rows"):
            read(write(['{"text": null}'] * 20), streaming=streaming)

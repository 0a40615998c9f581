"""What local files are, and which of them are read."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from datasets import Dataset
from words import ids_by_hand, load, make_texts, rows_of

from sae_accel.common.errors import InputError
from sae_accel.data.file_kinds import ARROW, CSV, JSON, OTHER, PARQUET, TEXT, kind_of


TEXTS = make_texts(12)
EXPECTED = ids_by_hand(TEXTS)
STREAMING = pytest.mark.parametrize("streaming", [False, True])
# A stream of CSV that is not read to its end leaves its file to the garbage collector; datasets closes it no sooner.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def lines(texts=TEXTS) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(texts=TEXTS) -> bytes:
    Dataset.from_dict({"text": texts}).to_parquet("made")
    return take("made")


def arrow() -> bytes:
    Dataset.from_dict({"text": TEXTS}).save_to_disk("saved")
    return next(Path("saved").glob("*.arrow")).read_bytes()


def take(name: str) -> bytes:
    content = Path(name).read_bytes()
    Path(name).unlink()
    return content


def write(name: str, content: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def sequences(path, **options) -> list[list[int]]:
    train, _ = load(path, ctx_len=12, eval_examples=0, shuffle_seed=None, **options)
    return rows_of(train)


def pieces(ids=EXPECTED) -> list[list[int]]:
    return [ids[i : i + 12] for i in range(0, len(ids) - 11, 12)]


JSON_LIST = json.dumps([{"text": text} for text in TEXTS]).encode()
CSV_ROWS = ("id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS))).encode()
# What files hold, by a word.
MADE = {
    "lines": lines,
    "list": lambda: JSON_LIST,
    "indented": lambda: json.dumps([{"text": text} for text in TEXTS], indent=2).encode(),
    "lines with a mark": lambda: b"\xef\xbb\xbf\n\n" + lines(),
    "lines of Windows": lambda: lines().replace(b"\n", b"\r\n"),
    "csv": lambda: CSV_ROWS,
    "tsv": lambda: CSV_ROWS.replace(b",", b"\t"),
    "parquet": parquet,
    "arrow": arrow,
    "gzip": lambda: gzip.compress(lines()),
    "gzip of a list": lambda: gzip.compress(JSON_LIST),
    "bzip2": lambda: bz2.compress(lines()),
    "xz": lambda: lzma.compress(lines()),
    "words": lambda: b"w1 w2\nw3",
    "UTF-16": lambda: "w1 w2".encode("utf-16"),
    "NUL": lambda: b"w1\0w2",
    "Latin-1": lambda: "wörter".encode("latin-1") * 40,
    "zeros": lambda: bytes(100),
    "zip": lambda: b"PK\x03\x04" + bytes(60),
    "tar": lambda: gzip.compress(bytes(257) + b"ustar" + bytes(200)),
}


@STREAMING
@pytest.mark.parametrize(
    ("content", "names"),
    [
        (
            "lines",
            "a.jsonl a.JSONL a.ndjson a.Json a.txt a.md a a.log a.csv a.parquet data[1].jsonl what?.jsonl a*.jsonl",
        ),
        ("list", "a.json a.JSON a.txt"),
        ("indented", "a.json a.jsonl"),
        ("lines with a mark", "a.jsonl a.txt"),
        ("lines of Windows", "a.jsonl"),
        ("csv", "a.csv a.CSV"),
        ("tsv", "a.tsv a.TSV"),
        ("parquet", "a.parquet a.PARQUET a.jsonl a.txt a"),
        ("arrow", "a.arrow a.parquet"),
        ("gzip", "a.jsonl.gz a.JSONL.GZ a.gz a.jsonl a.txt a"),
        ("gzip of a list", "a.json.gz"),
        ("bzip2", "a.jsonl.bz2"),
        ("xz", "a.JSONL.XZ"),
    ],
)
def test_a_file_is_read_as_what_it_holds_whatever_its_name_says(content, names, streaming):
    for name in names.split():
        assert sequences(write(name, MADE[content]()), streaming=streaming) == pieces(), name


@STREAMING
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.rst", "a", "a.py", "a.txt.gz", "a.TXT.GZ"])
def test_a_text_is_one_document_unless_lines_are(name, streaming):
    content = "\n".join(TEXTS).encode()
    write(name, gzip.compress(content) if name.lower().endswith("gz") else content)
    assert sequences(name, streaming=streaming) == pieces(ids_by_hand([" ".join(TEXTS)]))
    assert sequences(name, streaming=streaming, sample_by="line") == pieces()


def test_empty_lines_part_paragraphs():
    write("a.txt", f"{TEXTS[0]}\n{TEXTS[1]}\n\n{TEXTS[2]}\n".encode())
    expected = ids_by_hand([" ".join(TEXTS[:2]), TEXTS[2]])
    assert sequences("a.txt", sample_by="paragraph") == pieces(expected)
    assert sequences("a.txt", load_args={"sample_by": "line"}) == pieces(ids_by_hand([*TEXTS[:2], "", TEXTS[2]]))


@STREAMING
@pytest.mark.parametrize("sample_by", ["document", "line"])
def test_a_folder_gives_what_a_glob_of_its_files_gives(sample_by, streaming):
    for i, text in enumerate(TEXTS):
        write(f"d/{i % 3}/{i:02}.txt", text.replace(" ", "\n" if i % 2 else " ").encode())
    expected = sorted(Path("d").rglob("*.txt"))
    texts = [path.read_text() for path in expected]
    documents = [line for text in texts for line in text.split("\n")] if sample_by == "line" else texts
    options = {"sample_by": sample_by, "streaming": streaming}
    assert sequences("d", **options) == sequences("d/**/*.txt", **options) == pieces(ids_by_hand(documents))
    assert sequences("d/", **options) == sequences("d/**", **options) == pieces(ids_by_hand(documents))


BESIDE = [
    "_SUCCESS",
    ".DS_Store",
    ".part-0.crc",
    "README.md",
    "LICENSE",
    "dataset_infos.json",
    "x.lock",
    "sha256sums.txt",
    "cache-0a1b.arrow",
]


@STREAMING
@pytest.mark.parametrize("path", ["d", "d/*"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_is_no_data_is_left_out_by_name(path, beside, streaming, capsys):
    write("d/a.jsonl", lines()), write(f"d/{beside}", b"{}" if beside.endswith("json") else b"some words")
    assert sequences(path, streaming=streaming) == pieces()
    hidden = beside.startswith(".") and path == "d/*"
    assert (f"'{path}' is read without {beside}" in capsys.readouterr().err) != hidden


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt", "empty"])
def test_an_empty_file_is_left_out_by_name(name, capsys):
    write("d/a.jsonl", lines()), write(f"d/{name}", b"")
    assert sequences("d/*") == sequences("d") == pieces()
    assert f"without {name}, left out because they hold no data" in capsys.readouterr().err


def test_pictures_beside_texts_are_left_out_by_name_and_a_readme_among_texts_is_one(capsys):
    write("d/a.txt", TEXTS[0].encode()), write("d/README.md", TEXTS[1].encode()), write("d/logo.png", b"\x89PNG\0\0")
    assert sequences("d") == sequences("d/*") == pieces(ids_by_hand([TEXTS[1], TEXTS[0]]))
    assert "without logo.png" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["d", "d/*"])
@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("a.jsonl: lines", "b.txt: words", "1 of JSON (a.jsonl), 1 of text (b.txt)"),
        ("a.jsonl: lines", "b.parquet: parquet", "1 of JSON (a.jsonl), 1 of Parquet (b.parquet)"),
        ("a.csv: csv", "b.tsv: tsv", "1 of CSV (a.csv), 1 of TSV (b.tsv)"),
        ("a.txt: words", "b.txt: lines", "1 of text (a.txt), 1 of JSON (b.txt)"),
    ],
)
def test_several_kinds_are_refused_by_name(path, one, other, words):
    for name, content in (one.split(": "), other.split(": ")):
        write(f"d/{name}", MADE[content]())
    with pytest.raises(InputError) as raised:
        sequences(path)
    assert f"data.path: '{path}' holds files of several kinds: {words}" in str(raised.value)
    assert "\n" not in str(raised.value)


@STREAMING
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", "UTF-16", r"holds UTF-16 \(set --data.load_args.encoding NAME\)"),
        ("a.txt", "NUL", "holds bytes that are not UTF-8"),
        ("a.txt", "Latin-1", "holds bytes that are not UTF-8"),
        ("a.jsonl", "words", "does not hold JSON objects"),
        ("a.parquet", "words", "does not hold Parquet"),
        ("a.arrow", "zeros", "does not hold Arrow"),
        ("a.txt", "zip", "is a zip archive"),
        ("a.jsonl.gz", "tar", "is a tar archive"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_alone_and_in_a_folder(name, content, why, streaming):
    write(f"d/{name}", MADE[content]()), write("d/b.jsonl", lines())
    for path in (f"d/{name}", "d", "d/*"):
        with pytest.raises(InputError, match=why) as raised:
            sequences(path, streaming=streaming)
        assert name in str(raised.value) and "\n" not in str(raised.value)


@STREAMING
def test_a_compression_that_is_cut_off_is_refused_by_name(streaming):
    write("a.txt.gz", gzip.compress("\n".join(TEXTS).encode())[:-30])
    with pytest.raises(InputError, match=r"'a.txt.gz' cannot be read: .*end-of-stream"):
        sequences("a.txt.gz", streaming=streaming)


def test_a_compression_whose_package_is_missing_is_refused_with_its_name(monkeypatch):
    monkeypatch.setattr("sae_accel.data.file_kinds.find_spec", lambda name: None)
    write("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(InputError, match="is compressed with zstd, which needs the package zstandard"):
        sequences("a.jsonl.zst")


def test_a_stream_of_text_that_hides_its_compression_is_refused_with_what_to_do():
    write("a.txt", gzip.compress(TEXTS[0].encode()))
    assert sequences("a.txt") == pieces(ids_by_hand(TEXTS[:1]))
    with pytest.raises(InputError, match="'a.txt' is compressed with gzip, and a stream knows that only"):
        sequences("a.txt", streaming=True)


@STREAMING
def test_folders_and_files_with_glob_characters_are_found(streaming, capsys):
    write("run*/x[1].jsonl", lines()), write("run1/x1.jsonl", lines(make_texts(3)))
    for path in ("run*", "run*/x[1].jsonl"):
        assert sequences(path, streaming=streaming) == pieces()
    assert sequences("run1/x[1].jsonl", streaming=streaming) == pieces(ids_by_hand(make_texts(3)))


def test_tilde_is_the_home_folder(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder))
    write("a.jsonl", lines())
    assert sequences("~/a.jsonl") == sequences("~/*.jsonl") == pieces()


@pytest.mark.parametrize("path", ["d/b.jsonl", "d/*.csv", "d/sub"])
def test_a_path_that_names_nothing_is_told_with_what_is_near(path):
    write("d/a.jsonl", lines())
    with pytest.raises(InputError, match=r"cannot be loaded: .*\. .*In 'd' there is a.jsonl\.") as raised:
        sequences(path)
    assert "\n" not in str(raised.value) and repr(path) in str(raised.value)


@STREAMING
def test_a_folder_whose_files_are_named_for_splits_is_read_by_split(streaming, capsys):
    write("d/train.txt", TEXTS[0].encode()), write("d/test.txt", TEXTS[1].encode()), write("d/more.txt", b"w1 w2")
    assert sequences("d", streaming=streaming) == pieces(ids_by_hand(TEXTS[:1]))
    assert sequences("d", split="test", streaming=streaming) == pieces(ids_by_hand(TEXTS[1:2]))
    reason = "because other files are named for the splits train, test"
    assert f"without more.txt, left out {reason}" in capsys.readouterr().err


CARD = b"---\nconfigs:\n- {config_name: default, data_files: [{split: train, path: b.txt}]}\n---\n"


@pytest.mark.parametrize("options", [{}, {"load_args": {"data_files": "b.txt"}}, {"name": "default"}])
def test_a_folder_that_says_what_is_to_be_loaded_is_left_to_datasets(options):
    write("d/a.txt", TEXTS[0].encode()), write("d/b.txt", "\n".join(TEXTS[1:]).encode()), write("d/README.md", CARD)
    expected = ids_by_hand(TEXTS[1:])
    assert sequences("d", **options) == pieces(expected)
    assert sequences("d", sample_by="document", **options) == pieces(expected)


def test_a_cell_that_says_null_is_a_text():
    write("a.csv", b'text\nw1 w2\nnull\nNA\n""\nw3 w4 w5 w6 w7\n')
    unknown = 2
    assert sequences("a.csv", max_bad_rows=0) == [[4, 5, 0, unknown, 0, unknown, 0, 0, 6, 7, 8, 9]]


def test_sampling_of_what_is_no_text_is_refused():
    write("a.jsonl", lines())
    with pytest.raises(InputError, match="data.sample_by: it cuts texts, and 'a.jsonl' holds JSON"):
        sequences("a.jsonl", sample_by="line")


def test_ids_are_read_from_a_file_in_capitals_and_are_no_data_of_a_folder():
    ids = bytes(range(48))
    write("d/IDS.BIN", b"".join(bytes([one, 0]) for one in ids))
    assert sequences("d/IDS.BIN") == [list(range(i, i + 12)) for i in range(0, 48, 12)]
    for path in ("d", "d/*.BIN"):
        with pytest.raises(InputError, match="IDS.BIN' holds token ids. Set data.path to this one file"):
            sequences(path)


@STREAMING
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_an_encoding_that_is_given_is_read(encoding, streaming):
    write("a.txt", (TEXTS[0] + " ü").encode(encoding))
    unknown = 2
    found = sequences("a.txt", streaming=streaming, load_args={"encoding": encoding, "sample_by": "document"})
    assert found == [[*ids_by_hand(TEXTS[:1])[:-1], unknown]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a"])
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_alone_is_refused(name, content):
    with pytest.raises(InputError, match="since it is empty"):
        sequences(write(name, content))


def test_lines_of_json_that_are_no_objects_are_refused():
    with pytest.raises(InputError, match="does not hold JSON objects"):
        sequences(write("a.jsonl", b'"w1 w2"\n"w3"\n'))


@pytest.mark.parametrize(
    ("content", "kind", "columns"),
    [
        (b'{"text": "a"}\n', JSON, ("text",)),
        (b'{"text": "' + b"a" * 2**18 + b'"}\n', JSON, ("text",)),
        (b'{"a": 1}\n{"b": 2}\n{"c"', JSON, ("a", "b")),
        (b'{"text": "\xff\xfe"}\n{"text": "b"}\n', JSON, ("text",)),
        (b'{"text": "a\n{"text": "b"}\n', JSON, ("text",)),
        (b"{} is an empty set.\n", TEXT, ()),
        (b"[1] A note.\n", TEXT, ()),
        (b'"A word," he said.\n', TEXT, ()),
        ("ü".encode() * 2**15 + b"a", TEXT, ()),
        (b"a" * (2**16 - 1) + "ü".encode(), TEXT, ()),
        (b"PAR1....", PARQUET, ()),
        (b"ARROW1..", ARROW, ()),
        (b"%PDF-1.4\n\xe2\xe3\xcf\xd3", OTHER, ()),
    ],
    ids=range(13),
)
def test_the_first_bytes_tell_what_a_file_without_an_ending_holds(content, kind, columns):
    found = kind_of(write("a", content))
    assert (found.kind, found.columns) == (kind, columns)


def test_an_ending_tells_csv_from_text():
    assert kind_of(write("a.CSV.gz", gzip.compress(b"text\nw1\n"))).kind == CSV

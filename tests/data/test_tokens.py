import gc
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from tokenizers import processors
from torch.utils.data import DataLoader
from words import BOS, EOS, VOCAB, ids_by_hand, load, make_texts, make_tokenizer, rows_of

from sae_accel.common.errors import InputError
from sae_accel.data.collate import collate, token_mask
from sae_accel.data.tokens import DOCUMENTS_AT_ONCE, chunk_and_tokenize, load_tokens
from sae_accel.recipe.arguments import DataArguments


# A stream of CSV that is not read to its end leaves its file to the garbage collector; datasets closes it no sooner.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save(tmp_path, columns: dict, name: str = "saved", **kwargs) -> Path:
    Dataset.from_dict(columns, **kwargs).save_to_disk(tmp_path / name)
    return tmp_path / name


def write_ids(tmp_path, ids, dtype: str = "uint16") -> Path:
    np.asarray(ids).astype(dtype).tofile(tmp_path / "ids.bin")
    return tmp_path / "ids.bin"


def numbered_rows(count: int) -> dict[str, list[list[int]]]:
    """Rows that differ from each other, and of which number i starts with i."""
    return {"input_ids": [[i, *[i % 7 + 1] * 3] for i in range(count)]}


@pytest.mark.parametrize("streaming", [False, True])
def test_sequences_are_the_documents_each_followed_by_eos_and_cut(streaming):
    texts = make_texts(30)
    dataset = Dataset.from_dict({"text": texts, "source": range(30)})
    packed = chunk_and_tokenize(dataset.to_iterable_dataset() if streaming else dataset, make_tokenizer(), ctx_len=16)
    assert isinstance(packed, IterableDataset if streaming else Dataset)
    assert packed.column_names == ["input_ids"]
    expected = ids_by_hand(texts)
    assert rows_of(packed) == [expected[i : i + 16] for i in range(0, len(expected) - 15, 16)]
    assert len(rows_of(packed)) == 360 // 16


def test_no_bos_is_added_though_the_tokenizer_adds_one():
    assert make_tokenizer()("w1")["input_ids"] == [BOS, 4]
    packed = chunk_and_tokenize(Dataset.from_dict({"text": make_texts(20)}), make_tokenizer(), ctx_len=16)
    assert BOS not in {token for row in rows_of(packed) for token in row}


def test_sequences_decode_to_the_text():
    texts = make_texts(16, words=15)
    packed = chunk_and_tokenize(Dataset.from_dict({"text": texts}), make_tokenizer(), ctx_len=32)
    decoded = " ".join(make_tokenizer().decode(row) for row in rows_of(packed))
    assert decoded == " ".join(f"{text} <eos>" for text in texts)


def test_sequences_are_those_of_sparsify_but_for_its_first_eos():
    from sparsify.data import chunk_and_tokenize as peer_chunk_and_tokenize

    tokenizer = make_tokenizer()
    # Without a post-processor, and with room, sparsify puts in no BOS and cuts where it is told.
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.model_max_length = 1000
    dataset = Dataset.from_dict({"text": make_texts(100)})
    ours = torch.tensor(rows_of(chunk_and_tokenize(dataset, tokenizer, ctx_len=16))).flatten()
    theirs = peer_chunk_and_tokenize(dataset, tokenizer, max_seq_len=16, num_proc=1)["input_ids"][:].flatten()
    assert theirs[0] == EOS and len(theirs) > 1000
    assert torch.equal(theirs[1:], ours[: len(theirs) - 1])


@pytest.mark.parametrize("kind", [DatasetDict, IterableDatasetDict])
def test_every_split_of_a_dict_is_tokenised(kind):
    splits = {name: Dataset.from_dict({"text": make_texts(count)}) for name, count in (("train", 30), ("test", 10))}
    if kind is IterableDatasetDict:
        splits = {name: rows.to_iterable_dataset() for name, rows in splits.items()}
    packed = chunk_and_tokenize(kind(splits), make_tokenizer(), ctx_len=16)
    assert type(packed) is kind
    assert {name: len(rows_of(rows)) for name, rows in packed.items()} == {"train": 22, "test": 7}


@pytest.mark.parametrize("streaming", [False, True])
def test_batch_that_fills_no_sequence_is_no_error(streaming):
    # The first batch has 1000 EOS, of which no sequence of 1200 can be made; the second has 1200 ids.
    dataset = Dataset.from_dict({"text": [""] * DOCUMENTS_AT_ONCE + make_texts(100)})
    packed = chunk_and_tokenize(
        dataset.to_iterable_dataset() if streaming else dataset, make_tokenizer(), ctx_len=1200
    )
    assert rows_of(packed) == [ids_by_hand(make_texts(100))]


def test_one_document_more_than_a_batch_is_no_error():
    texts = make_texts(DOCUMENTS_AT_ONCE + 1, words=3)
    packed = chunk_and_tokenize(Dataset.from_dict({"text": texts}), make_tokenizer(), ctx_len=400)
    assert rows_of(packed)[-1] == ids_by_hand(texts)[3600:4000]


def test_processes_each_pack_their_share():
    texts = make_texts(40)
    packed = chunk_and_tokenize(Dataset.from_dict({"text": texts}), make_tokenizer(), ctx_len=16, num_proc=2)
    one, other = ids_by_hand(texts[:20]), ids_by_hand(texts[20:])
    assert rows_of(packed) == [ids[i : i + 16] for ids in (one, other) for i in range(0, 240, 16)]


def test_column_of_another_name_is_read():
    packed = chunk_and_tokenize(
        Dataset.from_dict({"text": ["w1"] * 9, "body": make_texts(9)}),
        make_tokenizer(),
        ctx_len=16,
        text_column="body",
    )
    assert rows_of(packed)[0] == ids_by_hand(make_texts(9))[:16]


def test_long_documents_bring_no_warning_and_do_not_miss_the_cache(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(
        "transformers.tokenization_utils_base.logger.warning", lambda *args, **kwargs: warnings.append(args)
    )
    path, tokenizer = save(tmp_path, {"text": make_texts(10)}), make_tokenizer()
    assert len(make_texts(1)[0].split()) > tokenizer.model_max_length
    first, again = (chunk_and_tokenize(Dataset.load_from_disk(path), tokenizer, ctx_len=16) for _ in range(2))
    assert not warnings
    assert first.cache_files and first.cache_files == again.cache_files
    other = chunk_and_tokenize(Dataset.load_from_disk(path), tokenizer, ctx_len=8)
    assert other.cache_files != first.cache_files


def test_tokenizer_without_eos_is_refused():
    with pytest.raises(InputError, match="has no EOS token"):
        chunk_and_tokenize(Dataset.from_dict({"text": ["w1"]}), make_tokenizer(eos=False), ctx_len=4)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_text_column_is_refused_with_those_that_exist(streaming):
    dataset = Dataset.from_dict({"body": ["w1"], "title": ["w2"]})
    with pytest.raises(InputError, match="no column 'text'; it has body, title"):
        chunk_and_tokenize(dataset.to_iterable_dataset() if streaming else dataset, make_tokenizer(), ctx_len=4)


@pytest.mark.parametrize(("values", "found"), [([1, 2], "int"), ([["w1"]], "list")])
def test_text_column_of_something_else_is_refused(values, found):
    with pytest.raises(InputError, match=f"column 'text' holds {found}, not text"):
        chunk_and_tokenize(Dataset.from_dict({"text": values}), make_tokenizer(), ctx_len=2)


def test_too_many_rows_without_text_are_refused_when_a_stream_comes_to_them():
    stream = Dataset.from_dict({"text": ["w1 w2", None]}).to_iterable_dataset()
    packed = chunk_and_tokenize(stream, make_tokenizer(), ctx_len=2)
    with pytest.raises(InputError, match="1 of 2 rows of the data cannot be used, .* row 1, whose text is null"):
        list(packed)


def test_dataset_of_less_than_a_sequence_is_refused_with_its_tokens():
    dataset = Dataset.from_dict({"text": make_texts(3)})
    with pytest.raises(InputError, match="has 36 tokens, less than one sequence of data.ctx_len = 37"):
        chunk_and_tokenize(dataset, make_tokenizer(), ctx_len=37)
    assert len(chunk_and_tokenize(dataset, make_tokenizer(), ctx_len=36)) == 1


def test_documents_too_short_to_fill_a_sequence_together_are_refused_with_the_reason():
    dataset = Dataset.from_dict({"text": ["w1"] * (DOCUMENTS_AT_ONCE + 200)})
    with pytest.raises(InputError, match="2400 tokens in 1200 documents, but no sequence .* at most 1000 documents"):
        chunk_and_tokenize(dataset, make_tokenizer(), ctx_len=2001)
    with pytest.raises(InputError, match="each of 2 processes joins its own"):
        chunk_and_tokenize(dataset.select(range(20)), make_tokenizer(), ctx_len=30, num_proc=2)


def test_dataset_without_rows_is_refused():
    with pytest.raises(InputError, match="no rows"):
        chunk_and_tokenize(Dataset.from_dict({"text": []}), make_tokenizer(), ctx_len=4)


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(make_texts(20)))
    train, held_out = load(tmp_path / "a.txt", shuffle_seed=None)
    expected = ids_by_hand([" ".join(make_texts(20))])
    assert rows_of(held_out) + rows_of(train) == [expected[i : i + 16] for i in range(0, 208, 16)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["txt", "md", "rst"])
def test_glob_reads_text_files_in_the_order_of_their_names(tmp_path, ending, streaming):
    texts = make_texts(3, words=30)
    for name, text in zip("cab", texts, strict=True):
        (tmp_path / f"{name}.{ending}").write_text(text)
    train, held_out = load(tmp_path / f"*.{ending}", shuffle_seed=None, streaming=streaming)
    expected = ids_by_hand([texts[1], texts[2], texts[0]])
    assert rows_of(held_out) + rows_of(train) == [expected[i : i + 16] for i in range(0, 80, 16)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["json", "jsonl", pytest.param("csv", marks=LEFT_OPEN), "parquet"])
def test_table_files_give_a_document_a_row(tmp_path, ending, streaming):
    dataset, path = Dataset.from_dict({"text": make_texts(12), "n": range(12)}), tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in dataset))
    else:
        getattr(dataset, f"to_{ending}")(path)
    train, held_out = load(path, shuffle_seed=None, streaming=streaming)
    expected = ids_by_hand(make_texts(12))
    assert rows_of(held_out) + rows_of(train) == [expected[i : i + 16] for i in range(0, 144, 16)]
    # So that a file left open is complained of here, not in a later test.
    gc.collect()


def make_source(kind: str, folder: Path, texts: list[str]) -> Path:
    dataset, path = Dataset.from_dict({"text": texts}), folder / "data"
    if kind == "saved":
        dataset.save_to_disk(path)
    elif kind == "saved splits":
        DatasetDict({"train": dataset}).save_to_disk(path)
    elif kind == "jsonl folder":
        path.mkdir()
        dataset.to_json(path / "a.jsonl")
    elif kind == "text files":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:03}.txt").write_text(text.replace(" ", "\n"))
        return path / "*.txt"
    elif kind == "parquet":
        dataset.to_parquet(folder / "data.parquet")
        return folder / "data.parquet"
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "saved splits", "jsonl folder", "text files", "parquet"])
def test_every_kind_of_source_gives_the_same_sequences(tmp_path, kind, streaming):
    texts = [make_texts(30, words=3 + i % 11)[i] for i in range(30)]
    path = make_source(kind, tmp_path, texts)
    train, held_out = load(path, ctx_len=8, eval_examples=3, streaming=streaming, shuffle_seed=None)
    expected = ids_by_hand(texts)
    sequences = [expected[i : i + 8] for i in range(0, len(expected) - 7, 8)]
    assert rows_of(held_out) == sequences[:3] and rows_of(train) == sequences[3:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "no split 'test'; it has train"),
        ({"eval_examples": 10_000}, "holds out 10000, so that none is left"),
        ({"text_column": "body"}, "no column 'body'; it has text"),
    ],
)
def test_saved_data_that_cannot_be_used_is_refused_in_one_line(tmp_path, options, message):
    with pytest.raises(InputError, match=message) as raised:
        load(make_source("saved splits", tmp_path, make_texts(30)), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_dataset_dict_gives_its_split(tmp_path, streaming):
    splits = {"train": make_texts(4), "test": make_texts(9)[4:]}
    DatasetDict({k: Dataset.from_dict({"text": v}) for k, v in splits.items()}).save_to_disk(tmp_path / "saved")
    train, _ = load(tmp_path / "saved", split="test", eval_examples=0, shuffle_seed=None, streaming=streaming)
    assert rows_of(train)[0] == ids_by_hand(splits["test"])[:16]
    with pytest.raises(InputError, match="no split 'validation'; it has train, test"):
        load(tmp_path / "saved", split="validation", streaming=streaming)


def test_folder_goes_through_load_dataset_with_its_arguments(tmp_path):
    (tmp_path / "data").mkdir()
    for name, texts in (("one", make_texts(8)), ("two", make_texts(20)[8:])):
        Dataset.from_dict({"text": texts}).to_json(tmp_path / "data" / f"{name}.jsonl")
    files = {"train": "one.jsonl", "extra": "two.jsonl"}
    train, _ = load(
        tmp_path / "data", split="extra[:50%]", load_args={"data_files": files}, eval_examples=0, shuffle_seed=None
    )
    assert rows_of(train) == [ids_by_hand(make_texts(14)[8:])[i : i + 16] for i in range(0, 64, 16)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"split": "nope"}, "nope"),
        ({"split": "train[:50"}, "train"),
        ({"name": "nope"}, "'nope' not found"),
        ({"load_args": {"nonsense": 1}}, "nonsense"),
        ({"load_args": {"path": "x"}}, "multiple values"),
        ({"load_args": {"data_files": "none.jsonl"}}, "none.jsonl"),
        ({"split": "nope", "streaming": True}, "nope"),
    ],
)
def test_wrong_arguments_of_load_dataset_are_refused_in_one_line(tmp_path, options, reason):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": make_texts(8)}).to_json(tmp_path / "data" / "rows.jsonl")
    with pytest.raises(InputError, match="cannot be loaded") as raised:
        load(tmp_path / "data", **options)
    assert reason in str(raised.value) and "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("path", ["none.txt", "none*.jsonl", "none", "owner/none"])
@pytest.mark.parametrize("streaming", [False, True])
def test_missing_data_is_refused(tmp_path, monkeypatch, path, streaming):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded") as raised:
        load(path, streaming=streaming)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("streaming", "verb"), [(False, "loaded"), (True, "read")])
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b'{"text": "w1"\n{{{'), ("a.txt", b"\xff\xfe\x00\x9f")])
def test_broken_file_is_refused(tmp_path, streaming, verb, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"cannot be {verb}") as raised:
        load(tmp_path / name, streaming=streaming)
    assert isinstance(raised.value.__cause__, Exception) and "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_tokenised_rows_are_cut_but_not_joined(tmp_path, streaming):
    rows = [list(range(1, 41)), [5, 6], [], list(range(16))]
    masks = [[1] * 39 + [0], [1, 0], [], [1] * 16]
    path = save(tmp_path, {"input_ids": rows, "attention_mask": masks, "text": ["w1"] * 4})
    train, _ = load(path, eval_examples=0, shuffle_seed=None, streaming=streaming)
    assert rows_of(train) == [rows[0][:16], rows[0][16:32], rows[0][32:], rows[1], rows[3]]
    assert [list(row["attention_mask"]) for row in train][2:4] == [[1] * 7 + [0], [1, 0]]
    assert set(next(iter(train))) == {"input_ids", "attention_mask"}


def test_tokenised_rows_that_differ_in_length_are_collated(tmp_path):
    rows, masks = [list(range(5)), list(range(20))], [[1] * 4 + [0], [1] * 20]
    path = save(tmp_path, {"input_ids": rows, "attention_mask": masks})
    train, _ = load(path, ctx_len=8, eval_examples=0, shuffle_seed=None)
    batch = collate([train[i] for i in range(len(train))], pad_token_id=9)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 8)
    assert batch["input_ids"][0].tolist() == [0, 1, 2, 3, 4, 9, 9, 9]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_tokenised_rows_need_no_tokenizer_with_eos(tmp_path):
    path = save(tmp_path, numbered_rows(4))
    arguments = DataArguments(path=str(path), ctx_len=4, eval_examples=0, shuffle_seed=None)
    train, held_out = load_tokens(arguments, make_tokenizer(eos=False), vocab_size=VOCAB)
    assert rows_of(train) == numbered_rows(4)["input_ids"] and held_out is None


def test_rows_of_fixed_length_and_tensor_format_are_cut(tmp_path):
    features = Features({"input_ids": List(Value("int32"), length=32)})
    dataset = Dataset.from_dict({"input_ids": [list(range(32))] * 2}, features=features).with_format("torch")
    dataset.save_to_disk(tmp_path / "saved")
    train, _ = load(tmp_path / "saved", eval_examples=0, shuffle_seed=None)
    assert rows_of(train) == [list(range(16)), list(range(16, 32))] * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("wrong", "extent"), [(VOCAB, f"from 0 to {VOCAB}"), (-100, "from -100 to 1")])
def test_tokenised_ids_that_the_lm_does_not_know_are_refused(tmp_path, streaming, wrong, extent):
    path = save(tmp_path, {"input_ids": [[0, VOCAB - 1], [0, 1, wrong]]})
    with pytest.raises(InputError, match=f"input_ids go {extent}, but the LM knows {VOCAB} ids"):
        list(load(path, eval_examples=0, streaming=streaming)[0])
    assert len(list(load(save(tmp_path, {"input_ids": [[0, VOCAB - 1]]}, "good"), eval_examples=0)[0])) == 1


def test_tokenizer_with_ids_that_the_lm_does_not_know_is_refused(tmp_path):
    path = save(tmp_path, {"text": ["w1 w2 w9"] * 20})
    # Word 9 has id 12. What matters is the ids in the text, not how many the tokenizer has.
    assert load(path, vocab_size=13)[0]
    with pytest.raises(InputError, match="tokenizer gives id 12, but the LM knows 12 ids"):
        load(path, vocab_size=12)


def test_mask_of_another_length_than_its_ids_is_refused(tmp_path):
    path = save(tmp_path, {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1]]})
    with pytest.raises(InputError, match="2 input_ids, but an attention_mask of 1"):
        load(path, eval_examples=0)


@pytest.mark.parametrize("column", [[1, 2], ["w1", "w2"], [[0.5], [1.5]]])
def test_input_ids_that_are_no_lists_of_ids_are_refused(tmp_path, column):
    with pytest.raises(InputError, match="'input_ids' does not hold lists of whole numbers"):
        load(save(tmp_path, {"input_ids": column}), eval_examples=0)


def load_numbered(tmp_path, source: str, count: int = 40, **kwargs):
    """`count` sequences of four ids, of which number i starts with i, from a file of ids, a dataset or a stream."""
    options = {"ctx_len": 4, "eval_examples": 5} | kwargs
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    if source == "bin":
        return load(write_ids(folder, numbered_rows(count)["input_ids"]), **options)
    return load(save(folder, numbered_rows(count)), streaming=source == "stream", **options)


SOURCES = pytest.mark.parametrize("source", ["map", "stream", "bin"])


@SOURCES
def test_first_sequences_are_held_out_and_the_rest_is_shuffled(tmp_path, source):
    train, held_out = load_numbered(tmp_path, source)
    order = [row[0] for row in rows_of(train)]
    assert [row[0] for row in rows_of(held_out)] == [0, 1, 2, 3, 4]
    assert sorted(order) == list(range(5, 40)) and order != sorted(order)
    assert {tuple(row) for row in rows_of(train)} == {tuple(row) for row in numbered_rows(40)["input_ids"][5:]}


@SOURCES
def test_order_follows_from_the_seed(tmp_path, source):
    orders = [
        [row[0] for row in rows_of(load_numbered(tmp_path, source, shuffle_seed=seed)[0])] for seed in (1, 1, 2, None)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == list(range(5, 40))


@SOURCES
def test_max_examples_keeps_the_first_of_the_shuffled(tmp_path, source):
    everything, _ = load_numbered(tmp_path, source)
    some, held_out = load_numbered(tmp_path, source, max_examples=7)
    assert rows_of(some) == rows_of(everything)[:7]
    assert len(rows_of(held_out)) == 5


@SOURCES
def test_nothing_is_held_out_if_none_is_asked_for(tmp_path, source):
    train, held_out = load_numbered(tmp_path, source, eval_examples=0)
    assert held_out is None and len(rows_of(train)) == 40


@SOURCES
def test_holding_out_everything_is_refused_with_both_counts(tmp_path, source):
    with pytest.raises(InputError, match="has 40 sequences .* holds out 40, so that none is left"):
        load_numbered(tmp_path, source, eval_examples=40)
    with pytest.raises(InputError, match="has 40 sequences .* holds out 99, so that none is left"):
        load_numbered(tmp_path, source, eval_examples=99)


@pytest.mark.parametrize(
    ("source", "order"),
    [
        ("map", [30, 21, 29, 10, 35, 25, 39, 12]),
        ("stream", [30, 21, 29, 10, 35, 25, 39, 12]),
        ("bin", [30, 21, 29, 10, 35, 25, 39, 12]),
    ],
)
def test_every_process_reads_the_same_order(tmp_path, source, order):
    # Written down by another process; a run that is resumed, and the other ranks of a run, count on it.
    assert [row[0] for row in rows_of(load_numbered(tmp_path, source)[0])][:8] == order


@SOURCES
def test_what_is_loaded_goes_through_a_data_loader(tmp_path, source):
    train, _ = load_numbered(tmp_path, source, shuffle_seed=None)
    batches = list(DataLoader(train, batch_size=10, collate_fn=collate))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(10, 4)] * 3 + [(5, 4)]
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == numbered_rows(40)["input_ids"][5:]
    assert all(batch["attention_mask"].all() for batch in batches)


@pytest.mark.parametrize("source", ["map", "bin"])
def test_what_is_loaded_is_read_by_place(tmp_path, source):
    train, held_out = load_numbered(tmp_path, source, shuffle_seed=None)
    assert (len(train), len(held_out)) == (35, 5)
    assert list(train[3]["input_ids"]) == numbered_rows(40)["input_ids"][8]
    assert list(train[-1]["input_ids"]) == numbered_rows(40)["input_ids"][39]
    with pytest.raises(IndexError):
        train[35]


def test_bin_file_drops_what_fills_no_sequence(tmp_path):
    train, _ = load(write_ids(tmp_path, np.arange(3 * 16 + 5) % VOCAB), eval_examples=0, shuffle_seed=None)
    assert rows_of(train) == (np.arange(48) % VOCAB).reshape(3, 16).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "token_dtype", "written"),
    [(65536, None, "uint16"), (65537, None, "uint32"), (VOCAB, "uint32", "uint32"), (128256, "uint16", "uint16")],
)
def test_width_of_ids_follows_the_vocabulary_unless_set(tmp_path, vocab_size, token_dtype, written):
    ids = np.random.default_rng(0).integers(0, min(vocab_size, 65536), (64, 16))
    path = write_ids(tmp_path, ids, written)
    train, _ = load(path, vocab_size=vocab_size, token_dtype=token_dtype, eval_examples=0, shuffle_seed=None)
    assert rows_of(train) == ids.tolist()


@pytest.mark.parametrize("vocab_size", [VOCAB, 49152, 128256, 262144])
@pytest.mark.parametrize(("written", "read"), [("uint16", "uint32"), ("uint32", "uint16")])
def test_ids_of_another_width_are_refused_with_what_to_set(tmp_path, vocab_size, written, read):
    ids = np.random.default_rng(0).integers(0, min(vocab_size, 2**16) if written == "uint16" else vocab_size, 5000)
    path = write_ids(tmp_path, ids, written)
    with pytest.raises(InputError, match=f"read as {read}.* Set --data.token_dtype {written}."):
        load(path, vocab_size=vocab_size, token_dtype=read)
    assert load(path, vocab_size=vocab_size, token_dtype=written)[0]


def test_file_of_half_an_id_is_refused(tmp_path):
    (tmp_path / "ids.bin").write_bytes(bytes(102))
    with pytest.raises(InputError, match="102 bytes, which is not a whole number of ids of uint32"):
        load(tmp_path / "ids.bin", token_dtype="uint32")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_bin_file_of_another_tokenizer_is_refused(tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, 2 * VOCAB, 5000)
    with pytest.raises(InputError, match=f"holds id {2 * VOCAB - 1}, but the LM knows {VOCAB} ids"):
        load(write_ids(tmp_path, ids, dtype), token_dtype=dtype)


@pytest.mark.parametrize("count", [1, 60])
def test_sequences_with_an_id_that_the_lm_does_not_know_are_left_out_of_a_file(tmp_path, count, capsys):
    ids = np.full(2**16, 3)
    ids[1::2] = 4
    # Each of them in a sequence of its own.
    ids[1500 : 1500 + 16 * count : 16] = VOCAB
    path = write_ids(tmp_path, ids)
    if count > 4096 // 100:
        with pytest.raises(InputError, match=f"row 93, which holds id {VOCAB}, but the LM knows {VOCAB} ids"):
            load(path)
        return
    train, _ = load(path, eval_examples=0, shuffle_seed=None)
    assert len(train) == 4096 - count and max(max(row) for row in rows_of(train)) < VOCAB
    assert "1 row of the data was left out" in capsys.readouterr().err
    with pytest.raises(InputError, match="data.bad_rows: it is stop, and row 93"):
        load(path, bad_rows="stop")


def test_missing_and_short_bin_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path / "none.bin")
    with pytest.raises(InputError, match="holds 15 tokens of uint16, less than one sequence of data.ctx_len = 16"):
        load(write_ids(tmp_path, range(15)))


def test_bin_file_is_sent_to_workers_by_its_name_not_its_content(tmp_path):
    train, _ = load(write_ids(tmp_path, np.arange(2**16) % VOCAB), ctx_len=1024)
    pickled = pickle.dumps(train)
    assert len(pickled) < 2**14
    assert rows_of(pickle.loads(pickled)) == rows_of(train)


def test_collate_fills_up_on_the_right():
    batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": np.array([8])}], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_collate_keeps_masks():
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1]}, {"input_ids": [8, 9], "attention_mask": [1, 0]}]
    assert collate(rows)["attention_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_padding_and_excluded_tokens_are_masked():
    batch = collate([{"input_ids": [1, 5, 6]}, {"input_ids": [5, 7]}], pad_token_id=7)
    assert token_mask(batch, []).tolist() == [[True, True, True], [True, True, False]]
    assert token_mask(batch, [1, 5]).tolist() == [[False, False, True], [False, True, False]]
    assert token_mask(batch, {1}).dtype == torch.bool

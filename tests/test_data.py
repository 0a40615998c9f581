import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sae_accel.arguments import DataArguments
from sae_accel.data import chunk_and_tokenize, collate, load_tokens, token_mask
from sae_accel.errors import InputError


WORDS = [f"w{i}" for i in range(50)]
VOCAB = {word: i for i, word in enumerate(["<eos>", "<bos>", "<unk>", *WORDS])}


@pytest.fixture
def tokenizer():
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As Llama's does, this tokenizer would put a BOS before each text.
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>", model_max_length=8)


def _documents(count=30):
    return [" ".join(WORDS[(i * 7 + j) % 50] for j in range(3 + i % 11)) for i in range(count)]


def _joined(documents):
    return [token for text in documents for token in [*(VOCAB[word] for word in text.split()), 0]]


def test_documents_are_joined_by_eos_and_cut_without_losing_a_token(tokenizer):
    documents = _documents()
    rows = chunk_and_tokenize(Dataset.from_dict({"text": documents, "url": documents}), tokenizer, ctx_len=16)
    assert rows.column_names == ["input_ids"]
    flat = [token for row in rows["input_ids"] for token in row]
    assert all(len(row) == 16 for row in rows["input_ids"])
    expected = _joined(documents)
    assert flat == expected[: len(expected) // 16 * 16] and 1 not in flat


def test_streams_and_several_processes_give_the_same_rows(tokenizer):
    data = Dataset.from_dict({"text": _documents()})
    rows = chunk_and_tokenize(data, tokenizer, ctx_len=16)["input_ids"]
    stream = chunk_and_tokenize(data.to_iterable_dataset(), tokenizer, ctx_len=16)
    assert [row["input_ids"] for row in stream] == list(rows)


def test_documents_that_fill_no_sequence_at_the_end_of_a_large_dataset_do_no_harm(tokenizer):
    documents = ["w1 w2 w3"] * 1000 + ["w4"]
    rows = chunk_and_tokenize(Dataset.from_dict({"text": documents}), tokenizer, ctx_len=16)
    assert len(rows) == 4000 // 16


def test_too_few_tokens_for_a_sequence_are_counted_in_the_error(tokenizer):
    with pytest.raises(InputError, match="has 4 tokens, less than one sequence of data.ctx_len = 16"):
        chunk_and_tokenize(Dataset.from_dict({"text": ["w1 w2", ""]}), tokenizer, ctx_len=16)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"body": ["a"]}, "no column 'text'; it has body"), ({"text": [3]}, "column 'text' holds int, not text")],
)
def test_a_wrong_text_column_is_refused(tokenizer, columns, message):
    with pytest.raises(InputError, match=message):
        chunk_and_tokenize(Dataset.from_dict(columns), tokenizer, ctx_len=4)


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        chunk_and_tokenize(Dataset.from_dict({"text": _documents()}), tokenizer, ctx_len=4)


def _load(path, tokenizer, **kwargs):
    arguments = DataArguments(path=str(path), **({"ctx_len": 8, "eval_examples": 3} | kwargs))
    return load_tokens(arguments, tokenizer, vocab_size=len(VOCAB))


def _ids(rows):
    return [list(map(int, row["input_ids"])) for row in rows]


def _make_source(kind, folder):
    documents = _documents()
    if kind == "saved":
        Dataset.from_dict({"text": documents}).save_to_disk(folder / "data")
    elif kind == "saved splits":
        DatasetDict({"train": Dataset.from_dict({"text": documents})}).save_to_disk(folder / "data")
    elif kind == "jsonl folder":
        (folder / "data").mkdir()
        Dataset.from_dict({"text": documents}).to_json(folder / "data" / "a.jsonl")
    elif kind == "text files":
        (folder / "data").mkdir()
        for i, text in enumerate(documents):
            (folder / "data" / f"{i:03}.txt").write_text(text.replace(" ", "\n"))
        return folder / "data" / "*.txt"
    elif kind == "parquet":
        Dataset.from_dict({"text": documents}).to_parquet(folder / "data.parquet")
        return folder / "data.parquet"
    return folder / "data"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "saved splits", "jsonl folder", "text files", "parquet"])
def test_every_kind_of_source_gives_the_same_sequences(tokenizer, tmp_path, kind, streaming):
    path = _make_source(kind, tmp_path)
    train, held_out = _load(path, tokenizer, streaming=streaming, shuffle_seed=None)
    expected = _joined(_documents())
    sequences = [expected[i : i + 8] for i in range(0, len(expected) - 7, 8)]
    assert _ids(held_out) == sequences[:3] and _ids(train) == sequences[3:]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_follows_from_the_seed_and_never_mixes_in_what_is_held_out(tokenizer, tmp_path, streaming):
    path = _make_source("saved", tmp_path)
    first, held_out = _load(path, tokenizer, streaming=streaming)
    again, _ = _load(path, tokenizer, streaming=streaming)
    other, _ = _load(path, tokenizer, streaming=streaming, shuffle_seed=7)
    plain, _ = _load(path, tokenizer, streaming=streaming, shuffle_seed=None)
    assert _ids(first) == _ids(again) != _ids(other)
    assert sorted(_ids(first)) == sorted(_ids(plain)) and _ids(first) != _ids(plain)
    few, none = _load(path, tokenizer, streaming=streaming, max_examples=4, eval_examples=0)
    assert len(list(few)) == 4 and none is None


@pytest.mark.parametrize(("dtype", "vocab"), [("uint16", 53), ("uint32", 70_000)])
def test_a_token_file_is_read_by_sequence_whatever_its_length(tokenizer, tmp_path, dtype, vocab):
    ids = np.random.default_rng(0).integers(0, vocab, 8 * 20 + 5)
    ids.astype(dtype).tofile(tmp_path / "tokens.bin")
    arguments = DataArguments(path=str(tmp_path / "tokens.bin"), ctx_len=8, eval_examples=2, shuffle_seed=None)
    train, held_out = load_tokens(arguments, tokenizer, vocab_size=vocab)
    assert _ids(held_out) + _ids(train) == ids[:160].reshape(20, 8).tolist()
    arguments.shuffle_seed = 1
    shuffled, _ = load_tokens(arguments, tokenizer, vocab_size=vocab)
    assert sorted(_ids(shuffled)) == sorted(_ids(train)) and _ids(shuffled) != _ids(train)


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        ("uint32", {}, "as in a file of uint32. Set data.token_dtype: uint32"),
        ("uint16", {"token_dtype": "uint32"}, "holds id .* Set data.token_dtype: uint16"),
        ("uint16", {"ctx_len": 10_000}, "less than one sequence"),
    ],
)
def test_a_token_file_of_another_width_is_found_out(tokenizer, tmp_path, dtype, options, message):
    np.random.default_rng(0).integers(0, len(VOCAB), 500).astype(dtype).tofile(tmp_path / "tokens.bin")
    with pytest.raises(InputError, match=message):
        _load(tmp_path / "tokens.bin", tokenizer, **options)


def test_a_tokenised_dataset_is_used_as_it_is_and_long_rows_are_cut(tokenizer, tmp_path):
    rows = [list(range(5)), list(range(20)), list(range(8))]
    masks = [[1] * 4 + [0], [1] * 20, [1] * 8]
    Dataset.from_dict({"input_ids": rows, "attention_mask": masks, "other": [1, 2, 3]}).save_to_disk(tmp_path / "d")
    train, _ = _load(tmp_path / "d", tokenizer, shuffle_seed=None, eval_examples=0)
    assert _ids(train) == [list(range(5)), list(range(8)), list(range(8, 16)), list(range(16, 20)), list(range(8))]
    batch = collate([train[i] for i in range(5)], pad_token_id=9)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 8)
    assert batch["input_ids"][0].tolist() == [0, 1, 2, 3, 4, 9, 9, 9]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_padding_and_excluded_tokens_do_not_train():
    batch = {"input_ids": torch.tensor([[3, 4, 5], [4, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert token_mask(batch, [4]).tolist() == [[True, False, True], [False, True, False]]
    assert token_mask(batch, []).tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nobody/nothing", {}, "'nobody/nothing' cannot be loaded: "),
        ("{}/data", {"split": "test"}, "no split 'test'; it has train|cannot be loaded"),
        ("{}/data", {"eval_examples": 10_000}, "holds out 10000, so that none is left"),
        ("{}/gone.bin", {}, "there is no file"),
        ("{}/data", {"text_column": "body"}, "no column 'body'; it has text"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_one_line(tokenizer, tmp_path, monkeypatch, path, options, message):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _make_source("saved splits", tmp_path)
    with pytest.raises(InputError, match=message) as error:
        _load(path.format(tmp_path), tokenizer, **options)
    assert "\n" not in str(error.value)

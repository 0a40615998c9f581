"""What stands between documents."""

import pytest
from datasets import Dataset
from words import EOS, VOCAB, ids_by_hand, make_texts, make_tokenizer, rows_of

from sae_accel.common.errors import InputError
from sae_accel.data.tokens import chunk_and_tokenize, load_tokens
from sae_accel.recipe.arguments import DataArguments


TEXTS = make_texts(9)


def pieces(separator: int) -> list[list[int]]:
    ids = [separator if one == EOS else one for one in ids_by_hand(TEXTS)]
    return [ids[i : i + 12] for i in range(0, len(ids), 12)]


@pytest.mark.parametrize(
    ("special", "separator", "expected"),
    [
        ({"eos_token": "<eos>"}, None, EOS),
        ({"eos_token": "<eos>", "sep_token": "w5"}, None, EOS),
        ({"sep_token": "w5"}, None, 8),
        ({"eos_token": "<eos>"}, "w7", 10),
        ({}, "w7", 10),
        ({}, "<eos>", EOS),
        ({}, 4, 4),
        ({"sep_token": "w5"}, 0, EOS),
    ],
)
def test_documents_are_parted_by_eos_or_else_by_sep_or_as_is_asked(tmp_path, special, separator, expected):
    tokenizer = make_tokenizer(eos=False)
    tokenizer.add_special_tokens(special)
    dataset = Dataset.from_dict({"text": TEXTS})
    assert rows_of(chunk_and_tokenize(dataset, tokenizer, ctx_len=12, separator=separator)) == pieces(expected)
    dataset.save_to_disk(tmp_path / "saved")
    arguments = DataArguments(
        path=str(tmp_path / "saved"), ctx_len=12, eval_examples=0, shuffle_seed=None, separator=separator
    )
    assert rows_of(load_tokens(arguments, tokenizer, vocab_size=VOCAB)[0]) == pieces(expected)


@pytest.mark.parametrize(
    ("separator", "message"),
    [
        (None, "data.separator: the tokenizer has no EOS token .* and no SEP token"),
        ("w77", "data.separator: 'w77' is not a token of the tokenizer. Did you mean w7"),
        ("<sep>", "data.separator: '<sep>' is not a token of the tokenizer"),
        (VOCAB, f"data.separator: the id {VOCAB} is not one of the {VOCAB} ids that are known"),
        (-1, "data.separator: the id -1 is not one"),
    ],
)
def test_a_separator_that_is_none_is_refused(separator, message):
    with pytest.raises(InputError, match=message) as raised:
        chunk_and_tokenize(Dataset.from_dict({"text": TEXTS}), make_tokenizer(eos=False), separator=separator)
    assert "\n" not in str(raised.value)


def test_a_separator_that_the_lm_does_not_know_is_refused(tmp_path):
    Dataset.from_dict({"text": ["w1 w2"] * 20}).save_to_disk(tmp_path / "saved")
    arguments = DataArguments(path=str(tmp_path / "saved"), ctx_len=4, separator="w40")
    with pytest.raises(InputError, match="data.separator: the id 43 is not one of the 40"):
        load_tokens(arguments, make_tokenizer(), vocab_size=40)


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_need_no_tokenizer_and_text_says_that_it_does(tmp_path, streaming):
    Dataset.from_dict({"input_ids": pieces(EOS)}).save_to_disk(tmp_path / "ids")
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "texts")
    options = {"ctx_len": 12, "eval_examples": 0, "shuffle_seed": None, "streaming": streaming}
    train, _ = load_tokens(DataArguments(path=str(tmp_path / "ids"), **options), vocab_size=VOCAB)
    assert rows_of(train) == pieces(EOS)
    with pytest.raises(InputError, match="model.name_or_path: the LM has no tokenizer, and the data is text"):
        load_tokens(DataArguments(path=str(tmp_path / "texts"), **options), vocab_size=VOCAB)

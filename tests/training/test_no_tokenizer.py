"""LMs without a tokenizer, such as those of games and proteins."""

import json

import pytest
from tiny import command_words, tiny_llama

from sae_accel.common.errors import InputError
from sae_accel.lm.load import load_tokenizer
from sae_accel.loading.auto import AutoSae
from sae_accel.recipe.arguments import ModelArguments
from sae_accel.train import main


@pytest.fixture
def bare(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "lm")
    rows = [json.dumps({"input_ids": [i % 90 + 2] * 16}) for i in range(60)]
    (tmp_path / "ids.jsonl").write_text("\n".join(rows))
    (tmp_path / "text.jsonl").write_text('{"text": "w1"}')
    return tmp_path


@pytest.mark.parametrize("loss", ["fvu", "kl"])
def test_they_train_on_ids(bare, capsys, loss):
    words = command_words(bare, bare, **{"data.path": bare / "ids.jsonl", "training.loss": loss})
    assert main(words) == 0
    assert list(AutoSae.from_pretrained(bare / "run")) == ["layers.1", "layers.2"]
    assert not list((bare / "run").rglob("*token*"))


def test_text_is_refused_in_one_line(bare, capsys):
    assert main(command_words(bare, bare)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "model.name_or_path: the LM has no tokenizer, and the data is text." in last


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
def test_a_tokenizer_that_cannot_be_read_is_refused(bare, name):
    assert load_tokenizer(ModelArguments(name_or_path=str(bare / "lm"))) is None
    (bare / "lm" / name).write_text("{")
    with pytest.raises(InputError, match="model.name_or_path: .*(cannot be loaded|no tokenizer)") as raised:
        load_tokenizer(ModelArguments(name_or_path=str(bare / "lm")))
    assert "\n" not in str(raised.value)

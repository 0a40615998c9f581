"""What is no LM, or is damaged, is refused in one line that says what it is."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from tiny import command_words, tiny_llama

import sae_accel.train as train
from sae_accel.models import SaeConfig, SaeModel


def config_with(**changes):
    def edit(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def half_of(name):
    def edit(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return edit


def with_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def refusal(words, capsys) -> str:
    capsys.readouterr()
    assert train.main(words) == 2
    # Beside bars, which end in a blank line.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line and "examples" not in line]
    assert line.startswith("sae_accel: ")
    return line


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without("config.json"), "has no config.json"),
        (without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
        (without("model.safetensors"), "no file named model.safetensors"),
        (with_text("config.json", ""), "not a valid JSON"),
        (with_text("config.json", "null"), "hold what they should not"),
        (with_text("tokenizer.json", "{"), "not valid JSON"),
        (with_text("tokenizer.json", "[]"), "hold what they should not"),
        (with_text("tokenizer_config.json", "[]"), "hold what they should not"),
        (config_with(model_type="nonsense"), "nonsense"),
        (config_with(model_type=[]), "hold what they should not"),
        (config_with(hidden_size="x"), "hidden_size"),
        (config_with(hidden_size=32), r"embed_tokens.weight should have shape (101, 32), but in its weights"),
        (config_with(num_hidden_layers=6), "lack 'layers.4."),
        (config_with(hidden_act="nope"), "nope"),
        (config_with(_attn_implementation="somebody/kernel"), "would run code of 'somebody/kernel'"),
        (half_of("model.safetensors"), "incomplete metadata"),
        (half_of("tokenizer.json"), "not valid JSON"),
    ],
)
def test_a_folder_without_what_an_lm_has_is_one_line(place, tmp_path, capsys, edit, says):
    shutil.copytree(place / "lm", tmp_path / "lm")
    edit(tmp_path / "lm")
    line = refusal(command_words(place, tmp_path, **{"model.name_or_path": tmp_path / "lm"}), capsys)
    assert "model.name_or_path: " in line and says in line


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{}/lm/config.json", "is a file"),
        ("{}/nowhere", "no such folder"),
        ("{}", "has no config.json"),
        ("https://huggingface.co/gpt2", "is an address"),
        ("{}/adapter", "is a PEFT adapter. Set --model.adapter"),
        ("{}/head", "is an SAE or transcoder"),
    ],
)
def test_what_is_no_lm_is_told_for_what_it_is(place, tmp_path, capsys, name, says):
    shutil.copytree(place / "lm", tmp_path / "lm")
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    SaeModel(SaeConfig(d_in=24, num_latents=48, k=2)).save_pretrained(tmp_path / "head")
    words = command_words(place, tmp_path, **{"model.name_or_path": name.format(tmp_path)})
    assert says in refusal(words, capsys)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without("adapter_config.json"), "has no adapter_config.json"),
        (without("adapter_model.safetensors"), "neither adapter_model.safetensors nor"),
        (half_of("adapter_model.safetensors"), "incomplete metadata"),
        (with_text("adapter_config.json", ""), "not valid JSON"),
        (with_text("adapter_config.json", '{"peft_type": "NOPE"}'), "NOPE"),
        (with_text("adapter_config.json", '{"peft_type": "LORA", "target_modules": "(("}'), "unterminated"),
        (with_text("adapter_config.json", '{"peft_type": "LORA", "r": "x"}'), "hold what they should not"),
    ],
)
def test_a_broken_adapter_is_one_line(place, tmp_path, capsys, edit, says):
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter")
    line = refusal(command_words(place, tmp_path, **{"model.adapter": tmp_path / "adapter"}), capsys)
    assert "model.adapter: " in line and says in line


@pytest.mark.parametrize(
    ("memory", "says"),
    [("{cpu: lots}", "'lots' is no size"), ("{foo: 1GiB}", "no device 'foo'"), ("{cpu: [1]}", "[1]")],
)
def test_memory_that_is_none_is_one_line(place, tmp_path, capsys, memory, says):
    words = command_words(place, tmp_path, **{"model.device_map": "auto", "model.max_memory": memory})
    line = refusal(words, capsys)
    assert "model.max_memory: " in line and says in line

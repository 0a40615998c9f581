"""No head with a number that is NaN or infinite is saved, released or converted."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_trainer

from sae_accel import AutoSae, SaeConfig, SaeModel
from sae_accel.common.errors import InputError, NotFinite
from sae_accel.convert import main as convert
from sae_accel.hub.release import Release
from sae_accel.push import main as push
from sae_accel.recipe.arguments import HeadArguments


def saved_with(folder, parameter: str, value: float, activation: str = "topk"):
    """A folder with two heads, of which the second has one such number in its file."""
    for name in ("layers.1", "layers.2"):
        head = SaeModel(SaeConfig(d_in=6, num_latents=12, k=2, activation=activation, hookpoint=name))
        head.save_pretrained(folder / name)
    file = folder / "layers.2" / "model.safetensors"
    tensors = load_file(file)
    tensors[parameter].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("encoder.weight", math.nan), ("encoder.bias", math.inf), ("W_dec", -math.inf), ("b_dec", math.nan)],
)
def test_a_folder_is_neither_released_nor_converted(tmp_path, capsys, parameter, value):
    folder = saved_with(tmp_path / "run", parameter, value)
    words = rf"'layers\.2'.*1 of [0-9]+ numbers of {parameter} are NaN or infinite"
    with pytest.raises(InputError, match=words):
        Release(folder, "name")
    assert push([str(folder), "name", "--dry-run"]) == 2
    for layout in ("saelens", "sparsify", "sae_accel"):
        assert convert([str(folder), str(tmp_path / layout), "--to", layout]) == 2
        assert not (tmp_path / layout).exists()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sae_accel: ")]
    assert len(errors) == 4
    assert all("'layers.2'" in line and parameter in line for line in errors)
    with pytest.raises(InputError, match=words):
        AutoSae.from_pretrained(folder).save_pretrained(tmp_path / "other")
    assert Release(folder, "name", include=["layers.1"]).heads.keys() == {"layers.1"}


def test_another_librarys_head_is_not_converted_either(tmp_path, capsys):
    head = SaeModel(SaeConfig(d_in=6, num_latents=12, k=2, hookpoint="layers.1"))
    head.save_pretrained(tmp_path / "run" / "layers.1")
    assert convert([str(tmp_path / "run"), str(tmp_path / "theirs"), "--to", "sparsify"]) == 0
    (file,) = (tmp_path / "theirs").rglob("*.safetensors")
    tensors = load_file(file)
    tensors["W_dec"][0, 0] = math.nan
    save_file(tensors, file)
    assert convert([str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "sae_accel"]) == 2
    assert "'layers.1'" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_threshold_is_held_to_it_too(tmp_path):
    folder = saved_with(tmp_path / "run", "threshold", math.inf, "jumprelu")
    with pytest.raises(InputError, match="threshold"):
        Release(folder, "name")


def test_numbers_that_are_large_but_finite_are_saved(tmp_path):
    head = SaeModel(SaeConfig(d_in=6, num_latents=12, k=2))
    head.W_dec.data.fill_(3e38)
    head.save_pretrained(tmp_path)
    assert torch.equal(AutoSae.from_pretrained(tmp_path).W_dec, head.W_dec)


def test_a_run_saves_no_such_weights_and_starts_from_none(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.heads["layers.2"].W_dec.data[0, 0] = math.nan
    with pytest.raises(NotFinite, match=r"W_dec of head 'layers\.2'.*checkpoint-1"):
        trainer.save_model(str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match=r"layers\.2.*W_dec"):
        trainer.heads["layers.2"].save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"training\.init_from.*layers\.2.*b_dec"):
        tiny_trainer(
            tmp_path / "third",
            [HeadArguments(hookpoints="layers.2", k=2, num_latents=12)],
            init_from=str(_wide(tmp_path / "second")),
        ).train()


def _wide(folder):
    head = SaeModel(SaeConfig(d_in=24, num_latents=12, k=2, hookpoint="layers.2"))
    head.save_pretrained(folder / "layers.2")
    file = folder / "layers.2" / "model.safetensors"
    tensors = load_file(file)
    tensors["b_dec"][0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    return folder

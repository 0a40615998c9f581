"""A mapping of heads: what they are called, and how it is written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_accel.common.errors import InputError
from sae_accel.formats import sae_lens
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel


def _head(hookpoint=None, **fields):
    config = SaeConfig(**{"d_in": 4, "num_latents": 12, "k": 2, "hookpoint": hookpoint} | fields)
    return SaeModel(config)


@pytest.fixture
def lens(tmp_path):
    """Heads as SAELens lays them out."""
    for index in (1, 2):
        name = f"blocks.{index}.hook_resid_post"
        config = _head(f"layers.{index}", base_model_name_or_path="llama", aliases=[name]).config
        sae_lens.write_head(tmp_path / "lens" / name, config, _head().state_dict())
    return tmp_path / "lens"


def test_heads_answer_to_our_name_and_to_their_own(lens, tmp_path):
    heads = AutoSae.open(lens)
    AutoSae.open(lens).save_pretrained(tmp_path / "ours")
    for mapping in (heads, AutoSae.open(tmp_path / "ours")):
        for name in ("layers.1", "blocks.1.hook_resid_post"):
            assert name in mapping and mapping[name].config.hookpoint == "layers.1"
        assert list(mapping.select("blocks.[2-9].hook_resid_post")) == [[*mapping][1]]
        assert len(mapping.select("blocks.*.hook_resid_post")) == 2
        assert "layers.3" not in mapping and "blocks.1.hook_resid_pre" not in mapping and 1 not in mapping


def test_what_has_one_name_twice_is_in_no_mapping(tmp_path):
    for name in ("layers.1/a", "layers.1/b"):
        _head("layers.1").save_pretrained(tmp_path / name)
    heads = AutoSae.open(tmp_path)
    assert "layers.1" not in heads and "layers.1/a" in heads
    with pytest.raises(InputError, match="several heads at 'blocks.1.hook_resid_post': layers.1/a, layers.1/b"):
        heads["blocks.1.hook_resid_post"]


def test_a_mapping_is_written_whole_or_not_at_all(tmp_path):
    for index in range(3):
        _head(f"layers.{index}").save_pretrained(tmp_path / "from" / f"layers.{index}")
    AutoSae.open(tmp_path / "from").save_pretrained(tmp_path / "to")
    before = load_file(tmp_path / "to" / "layers.0" / "model.safetensors")
    weights = tmp_path / "from" / "layers.2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with torch.no_grad():
        heads = AutoSae.open(tmp_path / "from")
        heads["layers.0"].b_dec.fill_(7)
    with pytest.raises(InputError, match="head 'layers.2' of .* its weights are damaged .* Fetch them again"):
        heads.save_pretrained(tmp_path / "to")
    assert torch.equal(load_file(tmp_path / "to" / "layers.0" / "model.safetensors")["b_dec"], before["b_dec"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]


def test_one_file_replaces_many(tmp_path):
    _head("layers.0").save_pretrained(tmp_path / "to" / "layers.0", max_shard_size=300)
    assert len([*(tmp_path / "to" / "layers.0").glob("model-*.safetensors")]) > 1
    new = _head("layers.0")
    new.save_pretrained(tmp_path / "from" / "layers.0")
    AutoSae.open(tmp_path / "from").save_pretrained(tmp_path / "to")
    assert torch.equal(AutoSae.from_pretrained(tmp_path / "to").W_dec, new.W_dec)
    assert [path.name for path in (tmp_path / "to" / "layers.0").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("fields", "change", "says"),
    [
        ({}, lambda weights: weights.pop("W_dec"), "by config.json it has W_dec, which its weights lack"),
        (
            {"activation": "jumprelu"},
            lambda weights: weights.pop("threshold"),
            "has threshold, which its weights lack",
        ),
        ({}, lambda weights: weights.update(more=torch.ones(2)), "its weights hold more, which no head with that"),
        (
            {},
            lambda weights: weights.update(W_dec=weights["W_dec"].int()),
            "W_dec in model.safetensors is of type I32; allowed are F64",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, fields, change, says):
    _head("layers.0", **fields).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=says):
        AutoSae.from_pretrained(tmp_path)


def test_a_head_without_a_decoder_needs_none(tmp_path):
    _head("layers.0").save_pretrained(tmp_path / "whole")
    head = AutoSae.from_pretrained(tmp_path / "whole", encoder_only=True)
    assert head.W_dec is None
    head.save_pretrained(tmp_path / "half")
    assert AutoSae.from_pretrained(tmp_path / "half").W_dec is None
    with pytest.raises(InputError, match="by config.json it has W_dec, which its weights lack"):
        AutoSae.from_pretrained(tmp_path / "half", encoder_only=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 1000}, "cannot be loaded: k is 1000, but it must be from 1 to num_latents, 12."),
        ({"k": 0}, "cannot be loaded: k is 0, but"),
        ({"k": "4"}, "cannot be loaded: k is '4', a str; allowed is int or null."),
        ({"normalize_input": "bad"}, "cannot be loaded: normalize_input is 'bad'; allowed are"),
        ({"input_scale": 2.0}, "but only heads of SAELens take it"),
        ({"device_map": "cuda:77"}, "device_map is 'cuda:77', but there is no such device here"),
    ],
)
def test_what_a_user_says_of_a_head_is_checked(tmp_path, options, says):
    _head("layers.0").save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        AutoSae.from_pretrained(tmp_path, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_k_that_a_user_gives_is_used(tmp_path):
    _head("layers.0").save_pretrained(tmp_path)
    head = AutoSae.from_pretrained(tmp_path, k=5)
    assert head.config.k == 5 and head.encode(torch.randn(3, 4)).top_acts.shape == (3, 5)

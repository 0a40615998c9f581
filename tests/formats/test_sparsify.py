import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeModel, TranscoderModel


def _peer(folder, dtype=torch.float32, **options):
    torch.manual_seed(1)
    coder = SparseCoder(24, SparseCoderConfig(k=4, expansion_factor=4, **options), dtype=dtype)
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    coder.save_to_disk(folder)
    return coder


def _edit(folder, **changes):
    keys = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, SaeModel),
        ({"num_latents": 60}, SaeModel),
        ({"activation": "groupmax"}, SaeModel),
        ({"multi_topk": True}, SaeModel),
        ({"transcode": True}, TranscoderModel),
        ({"transcode": True, "skip_connection": True}, TranscoderModel),
    ],
)
def test_a_head_that_sparsify_wrote_computes_the_same_here(tmp_path, options, kind):
    coder = _peer(tmp_path, **options)
    sae = AutoSae.from_pretrained(tmp_path)
    x = torch.randn(7, 24)
    acts, indices, _ = coder.encode(x)
    ours = sae.encode(x)
    dense = [torch.zeros(7, coder.num_latents).scatter(1, i, a) for a, i in ((acts, indices), ours)]
    torch.testing.assert_close(dense[1], dense[0], rtol=1e-6, atol=1e-6)
    expected = coder.decode(acts, indices) + (x @ coder.W_skip.T if options.get("skip_connection") else 0)
    torch.testing.assert_close(sae(x).reconstruction, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(sae, kind) and sae.config.k == 4


def test_many_heads_and_seeds_are_a_mapping(tmp_path):
    for name in ("layers.10", "layers.2/seed0", "layers.2/seed1"):
        _peer(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert list(AutoSae.from_pretrained(tmp_path)) == ["layers.2/seed0", "layers.2/seed1", "layers.10"]


def test_signed_files_of_mid_2024_keep_the_sign_of_the_largest_by_magnitude(tmp_path):
    coder = _peer(tmp_path)
    _edit(tmp_path, signed=True, multi_topk=None, transcode=None, skip_connection=None, activation=None)
    x = torch.randn(5, 24)
    pre = (x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias
    ours = AutoSae.from_pretrained(tmp_path).encode(x)
    expected = pre.abs().topk(4).indices
    assert torch.equal(ours.top_indices.sort().values, expected.sort().values)
    torch.testing.assert_close(ours.top_acts, pre.gather(1, ours.top_indices))
    assert (ours.top_acts < 0).any()


def test_folders_of_before_july_2024_hold_what_goes_into_a_layer(tmp_path):
    for name in ("layer_0", "layer_1", "layer_12"):
        _peer(tmp_path / name)
    saes = AutoSae.from_pretrained(tmp_path)
    assert list(saes) == ["embed_tokens", "layers.0", "layers.11"]
    assert saes["layer_12"] is saes["layers.11"] and saes["layer_12"].config.hookpoint == "layers.11"
    assert saes["layers.11"].config.aliases == ["layer_12"]


def test_the_run_says_which_lm_it_was(tmp_path):
    _peer(tmp_path / "layers.3")
    (tmp_path / "config.json").write_text('{"model": "EleutherAI/pythia-160m"}')
    assert AutoSae.from_pretrained(tmp_path).config.base_model_name_or_path == "EleutherAI/pythia-160m"


def test_the_oldest_tensor_names_are_read(tmp_path):
    coder = _peer(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["W_enc"] = tensors.pop("encoder.weight").T.contiguous()
    tensors["b_enc"] = tensors.pop("encoder.bias")
    save_file(tensors, tmp_path / "sae.safetensors")
    _edit(tmp_path, num_latents=None, d_sae=96, naive_decoder=True)
    x = torch.randn(5, 24)
    torch.testing.assert_close(AutoSae.from_pretrained(tmp_path)(x).reconstruction, coder(x).sae_out)


def test_an_old_transcoder_can_be_told_to_subtract_b_dec(tmp_path):
    coder = _peer(tmp_path, transcode=True)
    x = torch.randn(5, 24)
    old = AutoSae.from_pretrained(tmp_path, apply_b_dec_to_input=True)
    expected = coder.encode(x - coder.b_dec)
    torch.testing.assert_close(old.encode(x).top_acts.sort().values, expected.top_acts.sort().values)
    assert not torch.allclose(old.encode(x).top_acts, AutoSae.from_pretrained(tmp_path).encode(x).top_acts)


def test_precision_and_encoder_only_are_as_for_our_own_files(tmp_path):
    coder = _peer(tmp_path, dtype=torch.bfloat16)
    assert AutoSae.from_pretrained(tmp_path).dtype == torch.bfloat16
    sae = AutoSae.from_pretrained(tmp_path, dtype=torch.float32, encoder_only=True, device_map="cpu")
    assert sae.W_dec is None and torch.equal(sae.encoder.weight, coder.encoder.weight.float())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _edit(folder, num_latents=50), "says num_latents = 50, but its weights have 96"),
        (lambda folder: _edit(folder, k=500), "k is 500"),
        (lambda folder: (folder / "cfg.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "sae.safetensors").write_bytes(b"\x08"), r"is damaged \(.*\). Fetch it again"),
        (
            lambda folder: save_file({"b_dec": torch.zeros(24)}, folder / "sae.safetensors"),
            "no tensor 'encoder.weight'",
        ),
    ],
)
def test_a_head_whose_files_are_broken_or_disagree_is_refused(tmp_path, damage, message):
    _peer(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        AutoSae.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)

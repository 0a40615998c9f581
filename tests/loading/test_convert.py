"""The real packages load what is written for them, and compute the same."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from sparsify import SparseCoder

from sae_accel.common.errors import InputError
from sae_accel.convert import main
from sae_accel.loading.auto import AutoSae
from sae_accel.loading.convert import convert
from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sae_lens import SAE
    from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder, Transcoder

D, M, K = 12, 40, 3
pytestmark = pytest.mark.filterwarnings("ignore")


def _save(folder, name: str = "layers.3", transcoder: bool = False, **fields):
    torch.manual_seed(2)
    kind = (TranscoderModel, TranscoderConfig) if transcoder else (SaeModel, SaeConfig)
    head = kind[0](kind[1](**{"d_in": D, "num_latents": M, "k": K, "hookpoint": "layers.3"} | fields)).eval()
    with torch.no_grad():
        for key, tensor in head.state_dict(keep_vars=True).items():
            tensor.normal_(std=0.4)
            if key == "threshold":
                tensor.abs_()
    head.save_pretrained(folder / name)
    return head


@pytest.mark.parametrize(
    ("transcoder", "fields"),
    [
        (False, {}),
        (False, {"activation": "groupmax", "k": 4}),
        (True, {}),
        (True, {"skip_connection": True}),
    ],
)
def test_sparsify_computes_the_same(tmp_path, transcoder, fields):
    head = _save(tmp_path / "run", transcoder=transcoder, **fields)
    convert(str(tmp_path / "run"), tmp_path / "out", "sparsify")
    peer = SparseCoder.load_from_disk(tmp_path / "out" / "layers.3")
    x = torch.randn(9, D)
    acts, indices, _ = peer.encode(x)
    expected = peer.decode(acts, indices) + (x @ peer.W_skip.T if fields.get("skip_connection") else 0)
    torch.testing.assert_close(head(x).reconstruction, expected)
    back = AutoSae.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), back.parameters(), strict=True))
    assert back.config.normalize_decoder == head.config.normalize_decoder


def test_sparsify_loads_many_as_its_users_do(tmp_path):
    for name in ("layers.3", "layers.10"):
        _save(tmp_path / "run", name)
    convert(str(tmp_path / "run"), tmp_path / "out", "sparsify")
    many = SparseCoder.load_many(str(tmp_path / "out"), local=True)
    assert list(many) == ["layers.3", "layers.10"]


@pytest.mark.parametrize(
    ("fields", "peer_class"),
    [
        ({}, SAE),
        ({"normalize_input": "layer_norm"}, SAE),
        ({"normalize_input": "constant_norm", "apply_b_dec_to_input": False}, SAE),
        ({"activation": "signed_topk"}, SAE),
        ({"activation": "relu", "k": None}, SAE),
        ({"activation": "jumprelu"}, SAE),
        ({"activation": "batchtopk"}, SAE),
        ({"activation": "gated"}, SAE),
        ({"activation": "relu", "d_out": 8}, Transcoder),
        ({"activation": "relu", "d_out": 8, "skip_connection": True}, SkipTranscoder),
        ({"activation": "jumprelu", "d_out": 8}, JumpReLUTranscoder),
        ({"activation": "batchtopk", "d_out": 8, "skip_connection": True}, JumpReLUSkipTranscoder),
    ],
)
def test_saelens_computes_the_same(tmp_path, fields, peer_class):
    head = _save(tmp_path / "run", transcoder="d_out" in fields, **fields)
    convert(str(tmp_path / "run"), tmp_path / "out", "saelens")
    peer = peer_class.load_from_disk(str(tmp_path / "out" / "layers.3"))
    assert isinstance(peer, peer_class)
    x = 2 * torch.randn(9, D) + 0.3
    acts, indices = head.encode(x)
    latents = torch.zeros(9, M).scatter_add(1, indices, acts)
    with torch.no_grad():
        peer_latents = peer.encode(x)
        torch.testing.assert_close(head(x, return_loss=False).reconstruction, peer(x), rtol=1e-5, atol=1e-5)
    peer_latents = peer_latents.to_dense() if peer_latents.is_sparse else peer_latents
    torch.testing.assert_close(latents, peer_latents, rtol=1e-5, atol=1e-5)
    back = AutoSae.from_pretrained(tmp_path / "out")
    assert all(torch.equal(b, head.state_dict()[name]) for name, b in back.state_dict().items())
    assert back.config.hookpoint == "layers.3" or "d_out" in fields
    hook = json.loads((tmp_path / "out" / "layers.3" / "cfg.json").read_text())["metadata"]["hook_name"]
    assert hook == ("blocks.3.hook_resid_pre" if "d_out" in fields else "blocks.3.hook_resid_post")


@pytest.mark.parametrize(
    ("to", "transcoder", "fields", "reason"),
    [
        ("saelens", True, {}, "it is a transcoder with activation topk, which SAELens does not have"),
        ("saelens", False, {"activation": "groupmax", "k": 4}, "it is an SAE with activation groupmax"),
        ("sparsify", False, {"activation": "batchtopk"}, "it has activation batchtopk, which sparsify's"),
        ("sparsify", False, {"normalize_input": "layer_norm"}, "it has normalize_input layer_norm"),
        ("sparsify", True, {"d_out": 8}, "it has d_out 8 beside d_in 12"),
        ("sparsify", False, {"apply_b_dec_to_input": False}, "it has apply_b_dec_to_input False"),
        ("sparsify", False, {"encoder_only": True}, "it was saved without its decoder"),
        ("saelens", False, {"encoder_only": True}, "it was saved without its decoder"),
    ],
)
def test_a_head_that_the_other_does_not_have_is_refused_and_nothing_written(tmp_path, to, transcoder, fields, reason):
    _save(tmp_path / "run", "layers.1")
    _save(tmp_path / "run", transcoder=transcoder, **fields)
    with pytest.raises(InputError, match=f"Head 'layers.3' of .* cannot be written for {to}: {reason}"):
        convert(str(tmp_path / "run"), tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_command_takes_what_files_do_not_tell(tmp_path):
    head = _save(tmp_path / "run", activation="relu", k=None)
    convert(str(tmp_path / "run"), tmp_path / "lens", "saelens")
    config = tmp_path / "lens" / "layers.3" / "cfg.json"
    config.write_text(config.read_text().replace('"none",\n  "resh', '"expected_average_only_in",\n  "resh'))
    words = [str(tmp_path / "lens"), str(tmp_path / "out"), "--to", "sae_accel"]
    assert main(words) == 2 and main([*words, "--input-scale", "4"]) == 0
    x = torch.randn(9, D)
    torch.testing.assert_close(
        AutoSae.from_pretrained(tmp_path / "out")(x).reconstruction, head(4 * x).reconstruction / 4
    )


def test_the_command_says_what_it_wrote_and_refuses_in_one_line(tmp_path, capsys):
    for name in ("layers.3", "layers.10"):
        _save(tmp_path / "run", name)
    run, out = str(tmp_path / "run"), str(tmp_path / "new" / "out")
    assert main([run, out, "--to", "saelens", "--include", "layers.3"]) == 0
    assert "layers.3  topk" in capsys.readouterr().out and list(AutoSae.open(out)) == ["layers.3"]
    assert main([run, out, "--to", "saelens"]) == 2 and "is there already" in capsys.readouterr().err
    assert main([out, str(tmp_path / "back"), "--to", "sae_accel"]) == 0
    assert AutoSae.from_pretrained(tmp_path / "back").config.aliases == ["blocks.3.hook_resid_post"]
    words = [
        sys.executable,
        "-m",
        "sae_accel.convert",
        str(tmp_path / "none"),
        str(tmp_path / "x"),
        "--to",
        "sparsify",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "There is no folder" in done.stderr

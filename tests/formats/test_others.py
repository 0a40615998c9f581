"""Files as other libraries leave them, made on the spot, against their formulas on dense tensors."""

import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import relu

from sae_accel.common.errors import InputError
from sae_accel.formats import tensor_file
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel, TranscoderModel


D, M, K = 12, 40, 3


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(tensor_file, "_PIECE_BYTES", 7 * D * 4)


@pytest.fixture
def x():
    return torch.randn(30, D, generator=torch.Generator().manual_seed(3)) + 0.3


@pytest.fixture
def w():
    """Weights by shape, (d, M) and (M, d)."""
    torch.manual_seed(1)
    w = {"W_enc": torch.randn(D, M), "W_dec": torch.randn(M, D), "b_enc": torch.randn(M), "b_dec": torch.randn(D)}
    return w | {"threshold": torch.rand(M) + 0.5}


def _acts(w: dict, x: torch.Tensor, subtract: bool, gate=None) -> torch.Tensor:
    pre = (x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"]
    if isinstance(gate, int):
        values, indices = relu(pre).topk(gate)
        return torch.zeros_like(pre).scatter(-1, indices, values)
    return relu(pre) if gate is None else pre * (pre > gate)


def _agrees(head, x: torch.Tensor, acts: torch.Tensor, expected: torch.Tensor) -> None:
    found, indices = head.encode(x)
    dense = torch.zeros_like(acts).scatter_add(-1, indices, found)
    torch.testing.assert_close(dense, acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(x, return_loss=False).reconstruction, expected, rtol=1e-5, atol=1e-4)


def _npz(folder, w: dict, lower: bool = False) -> None:
    folder.mkdir(parents=True)
    arrays = {name.lower() if lower else name: tensor.numpy() for name, tensor in w.items()}
    np.savez(folder / "params.npz", **arrays)


@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope(tmp_path, w, x, lower):
    root = tmp_path / "gemma-scope-2b-pt-res"
    for folder in (
        "layer_20/width_16k/average_l0_7",
        "layer_20/width_16k/average_l0_13",
        "layer_3/width_1m/average_l0_9",
    ):
        _npz(root / folder, w, lower)
    saes = AutoSae.from_pretrained(root)
    assert list(saes) == [
        "layers.3/width_1m/average_l0_9",
        "layers.20/width_16k/average_l0_7",
        "layers.20/width_16k/average_l0_13",
    ]
    head = saes["layer_20/width_16k/average_l0_7"]
    acts = _acts(w, x, subtract=False, gate=w["threshold"])
    _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"])
    assert (head.config.hookpoint, head.config.k) == ("layers.20", 7)
    assert "blocks.20.hook_resid_post" in head.config.aliases
    assert head.config.base_model_name_or_path == "google/gemma-2-2b"
    assert saes["layers.3"].config.k == 9
    with pytest.raises(InputError, match="several heads at 'layers.20'"):
        saes["layers.20"]


def test_gemma_scope_on_embeddings_mlps_and_attention(tmp_path, w, x):
    _npz(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6", w)
    head = AutoSae.from_pretrained(tmp_path / "gemma-scope-2b-pt-res")
    acts = _acts(w | {"W_enc": w["W_enc"] / D**0.5}, x, subtract=False, gate=w["threshold"])
    _agrees(head, x, acts, acts @ w["W_dec"] * D**0.5 + w["b_dec"])
    assert head.config.hookpoint == "embed_tokens"
    for kind, hookpoint in (("mlp", "layers.5.post_feedforward_layernorm"), ("att", None)):
        _npz(tmp_path / f"gemma-scope-9b-pt-{kind}" / "layer_5" / "width_16k" / "average_l0_6", w)
        assert AutoSae.from_pretrained(tmp_path / f"gemma-scope-9b-pt-{kind}").config.hookpoint == hookpoint


def test_gemma_scope_transcoders(tmp_path, w, x):
    root = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_5" / "width_16k" / "average_l0_6"
    _npz(root, w)
    head = AutoSae.from_pretrained(tmp_path / "gemma-scope-2b-pt-transcoders")
    acts = _acts(w, x, subtract=False, gate=w["threshold"])
    _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"])
    assert isinstance(head, TranscoderModel) and "blocks.5.ln2.hook_normalized" in head.config.aliases


def test_gemma_scope_2(tmp_path, w, x):
    folder, skip = tmp_path / "transcoder_all" / "layer_5_width_16k_l0_small_affine", torch.randn(D, D)
    folder.mkdir(parents=True)
    lower = {name.lower(): tensor for name, tensor in w.items()} | {"affine_skip_connection": skip}
    save_file(lower, folder / "params.safetensors")
    keys = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "affine_connection": True,
    }
    (folder / "config.json").write_text(json.dumps(keys))
    head = AutoSae.from_pretrained(tmp_path)
    acts = _acts(w, x, subtract=False, gate=w["threshold"])
    _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"] + x @ skip)
    assert head.config.hookpoint == "layers.5.post_feedforward_layernorm"
    assert head.config.source == "layers.5.pre_feedforward_layernorm"
    assert head.config.base_model_name_or_path == "google/gemma-3-1b-pt"


@pytest.mark.parametrize("new", [False, True])
def test_llama_scope(tmp_path, w, x, new):
    name, norm = "Llama3_1-8B-Base-L15R-8x", 7.0
    scale, folder = D**0.5 / norm, tmp_path / name
    tensors = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.bias": w["b_dec"],
    }
    keys = {"d_model": D, "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post"}
    keys["dataset_average_activation_norm"] = {"in": norm, "out": norm}
    (folder / "checkpoints").mkdir(parents=True)
    if new:
        tensors["log_jumprelu_threshold"] = w["threshold"].log()
        save_file(tensors, folder / "sae_weights.safetensors")
        (folder / "config.json").write_text(json.dumps(keys))
        gate = w["threshold"]
    else:
        save_file(tensors, folder / "checkpoints" / "final.safetensors")
        keys |= {"d_sae": M, "jump_relu_threshold": 0.7}
        (folder / "hyperparams.json").write_text(json.dumps(keys))
        gate = 0.7 * scale
    head = AutoSae.from_pretrained(tmp_path)
    acts = _acts(w, x * scale, subtract=False, gate=torch.as_tensor(gate))
    _agrees(head, x, acts, (acts @ w["W_dec"] + w["b_dec"]) / scale)
    assert head.config.hookpoint == "layers.15"
    assert head.config.aliases == ["blocks.15.hook_resid_post", name]


def test_llamascopium_weighs_latents_by_their_decoder_rows(tmp_path, w, x):
    tensors = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    tensors["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    keys = {
        "sae_type": "sae",
        "hook_point_in": "blocks.2.hook_resid_post",
        "hook_point_out": "blocks.2.hook_resid_post",
    }
    keys |= {"d_model": D, "act_fn": "jumprelu", "sparsity_include_decoder_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    head = AutoSae.from_pretrained(tmp_path)
    pre, norms = x @ w["W_enc"] + w["b_enc"], w["W_dec"].norm(dim=1)
    acts = pre * (pre * norms > w["threshold"])
    _agrees(head, x, acts * norms, acts @ w["W_dec"] + w["b_dec"])
    (tmp_path / "config.json").write_text(json.dumps(keys | {"sae_type": "crosscoder"}))
    with pytest.raises(InputError, match="it is a 'crosscoder' of Llamascopium"):
        AutoSae.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "subtract", "gate"),
    [
        ("AutoEncoder", True, None),
        ("AutoEncoderNew", False, None),
        ("AutoEncoderTopK", True, K),
        ("BatchTopKSAE", True, 0.6),
        ("MatryoshkaBatchTopKSAE", True, 0.6),
        ("JumpReluAutoEncoder", False, "own"),
    ],
)
def test_dictionary_learning(tmp_path, w, x, kind, subtract, gate):
    folder = tmp_path / "pythia-160m" / "resid_post_layer_8" / "trainer_0"
    folder.mkdir(parents=True)
    state = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "encoder.bias": w["b_enc"]}
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        state = {name: w[name] for name in ("W_enc", "W_dec", "b_enc")}
    state[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")] = w["b_dec"]
    if kind not in ("AutoEncoder", "AutoEncoderNew"):
        state |= {"threshold": w["threshold"] if gate == "own" else torch.tensor(0.6), "k": torch.tensor(K)}
    torch.save(state, folder / "ae.pt")
    trainer = {
        "dict_class": kind,
        "activation_dim": D,
        "dict_size": M,
        "layer": 8,
        "lm_name": "EleutherAI/pythia-160m",
    }
    trainer |= {"k": K} if "TopK" in kind else {}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 1024}}))
    saes = AutoSae.open(tmp_path / "pythia-160m")
    assert list(saes) == ["layers.8/trainer_0"] and saes["resid_post_layer_8/trainer_0"].config.hookpoint == "layers.8"
    gate = w["threshold"] if gate == "own" else torch.tensor(gate) if isinstance(gate, float) else gate
    acts = _acts(w, x, subtract, gate)
    _agrees(saes["layers.8"], x, acts, acts @ w["W_dec"] + w["b_dec"])


def test_dictionary_learning_gated(tmp_path, w, x):
    r_mag, mag_bias = torch.randn(M), torch.randn(M)
    state = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "decoder_bias": w["b_dec"]}
    state |= {"gate_bias": w["b_enc"], "mag_bias": mag_bias, "r_mag": r_mag}
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "GatedAutoEncoder"}}))
    pre = (x - w["b_dec"]) @ w["W_enc"]
    acts = (pre + w["b_enc"] > 0) * relu(r_mag.exp() * pre + mag_bias)
    _agrees(AutoSae.from_pretrained(tmp_path), x, acts, acts @ w["W_dec"] + w["b_dec"])
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    with pytest.raises(InputError, match="its dict_class is 'CrossCoder'; AutoEncoder"):
        AutoSae.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["TopK", "ReLU"])
def test_openai(tmp_path, w, x, kind):
    folder = tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    state = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "pre_bias": w["b_dec"]}
    state |= {"latent_bias": w["b_enc"], "stats_last_nonzero": torch.zeros(M), "activation": kind}
    state["activation_state_dict"] = {"k": K} if kind == "TopK" else {}
    torch.save(state, folder / "8.pt")
    head = AutoSae.from_pretrained(folder / "8.pt")
    if kind == "ReLU":
        acts = _acts(w, x, subtract=True)
        _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"])
    else:
        mean, std = x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
        acts = _acts(w, (x - mean) / (std + 1e-5), subtract=True, gate=K)
        _agrees(head, x, acts, (acts @ w["W_dec"] + w["b_dec"]) * std + mean)
    assert AutoSae.from_pretrained(tmp_path / "gpt2-small").config.hookpoint == "h.8"


def test_goodfire_qwen_scope_and_plain_linear_layers(tmp_path, w, x):
    transposed = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save(transposed, tmp_path / "layer7.sae.pt")
    with pytest.raises(InputError, match="does not tell how many latents are active for each token. Give k"):
        AutoSae.from_pretrained(tmp_path)
    acts = _acts(w, x, subtract=False, gate=K)
    _agrees(AutoSae.from_pretrained(tmp_path, k=K), x, acts, acts @ w["W_dec"] + w["b_dec"])
    named = tmp_path / "SAE-Res-Qwen3-8B-Base-W32K-L0_3"
    named.mkdir()
    (tmp_path / "layer7.sae.pt").rename(named / "layer7.sae.pt")
    head = AutoSae.open(named)["layers.7"]
    _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"])
    acts = _acts(w, x, subtract=False)
    for encoder, decoder in (("encoder_linear", "decoder_linear"), ("encoder", "decoder")):
        state = {f"{encoder}.weight": w["W_enc"].T, f"{decoder}.weight": w["W_dec"].T}
        state |= {f"{encoder}.bias": w["b_enc"], f"{decoder}.bias": w["b_dec"]}
        torch.save(state, tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth")
        head = AutoSae.from_pretrained(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth")
        _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"])
        assert head.config.hookpoint == "layers.19"


@pytest.mark.parametrize("kind", ["relu", "threshold", "topk"])
def test_circuit_tracer(tmp_path, w, x, kind):
    skip = torch.randn(D, D)
    tensors = {"W_enc": w["W_enc"].T.contiguous(), "W_skip": skip} | {n: w[n] for n in ("W_dec", "b_enc", "b_dec")}
    keys = {"model_kind": "transcoder_set", "model_name": "Qwen/Qwen3-0.6B", "feature_input_hook": "mlp.hook_in"}
    keys |= {"feature_output_hook": "hook_mlp_out"}
    if kind == "threshold":
        tensors["activation_function.threshold"] = w["threshold"]
    if kind == "topk":
        keys |= {"activation": "topk", "k": K}
    for layer in (2, 10):
        save_file(tensors, tmp_path / f"layer_{layer}.safetensors")
    (tmp_path / "config.yaml").write_text(json.dumps(keys))
    saes = AutoSae.from_pretrained(tmp_path)
    acts = _acts(w, x, False, {"relu": None, "threshold": w["threshold"], "topk": K}[kind])
    head = saes["layer_10"]
    _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"] + x @ skip.T)
    assert len(saes) == 2 and head.config.hookpoint == "layers.10.mlp"
    assert head.config.aliases[:2] == ["blocks.10.mlp.hook_in", "blocks.10.hook_mlp_out"]
    assert saes["layers.10.mlp"] is head


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["ae.pt", "8.pt"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, name):
    written = tmp_path / "written"
    torch.save({"encoder.weight": torch.zeros(4, 4), "own": _Malicious(written)}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    with pytest.raises(InputError, match="objects that could run code") as error:
        AutoSae.from_pretrained(tmp_path)
    assert not written.exists() and "\n" not in str(error.value)
    torch.load(tmp_path / name, weights_only=False)
    assert written.exists(), "The file would have done nothing anyway."


def test_damaged_files_are_refused_in_one_line(tmp_path, w):
    _npz(tmp_path / "a" / "layer_1", w)
    torch.save({"encoder_linear.weight": w["W_dec"]}, tmp_path / "b.pt")
    torch.save(w["W_dec"], tmp_path / "c.pt")
    save_file(w | {"b_enc": torch.zeros(7)}, tmp_path / "layer_3.safetensors")
    for file, keep in ((tmp_path / "a" / "layer_1" / "params.npz", 3000), (tmp_path / "b.pt", 600)):
        file.write_bytes(file.read_bytes()[:keep])
    for path in ("a", "b.pt", "c.pt", "layer_3.safetensors"):
        with pytest.raises(InputError, match="cannot be loaded|" + path.split(".")[0]) as error:
            AutoSae.from_pretrained(tmp_path / path)
        assert "\n" not in str(error.value)
    assert {"b", "c"}.isdisjoint(AutoSae.open(tmp_path))


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec"])
def test_a_tensor_of_another_number_of_dimensions_is_told_by_name(tmp_path, w, name):
    wrong = w[name][None] if name == "b_dec" else w[name][0]
    save_file(w | {name: wrong.contiguous()}, tmp_path / "layer_3.safetensors")
    shape = re.escape(str(tuple(wrong.shape)))
    with pytest.raises(InputError, match=f"{name} of .*layer_3.safetensors' has shape {shape}, where a .-dimensional"):
        AutoSae.from_pretrained(tmp_path)


def _relu_state(w: dict) -> dict:
    """Of dictionary_learning's AutoEncoder."""
    weights = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    return weights | {"encoder.bias": w["b_enc"], "bias": w["b_dec"]}


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _change(content: bytes) -> bytes:
    """Another byte in the middle, which is in the largest tensor."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("params.npz", _cut, "File is not a zip file"),
        ("params.npz", _change, "Bad CRC-32"),
        ("by_columns/params.npz", _change, "Bad CRC-32"),
        ("compressed/params.npz", _change, "Error -3|Bad CRC-32"),
        ("params.npz", lambda content: b"not found", "File is not a zip file"),
        ("text/params.npz", lambda content: content, "EOF: reading magic string"),
        ("ae.pt", _cut, "its end is missing"),
        ("ae.pt", _change, "Bad CRC-32"),
        ("layer_3.safetensors", _cut, "incomplete metadata"),
        ("layer_3.safetensors", lambda content: b"", "header too small"),
    ],
)
def test_of_a_damaged_file_it_is_said_what_is_wrong_and_what_to_do(tmp_path, w, file, damage, reason):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    match file:
        case "text/params.npz":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("notes.txt", "hello")
        case "ae.pt":
            torch.save(_relu_state(w), path)
            (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
        case "layer_3.safetensors":
            save_file(w | {"W_enc": w["W_enc"].T.contiguous()}, path)
        case "compressed/params.npz":
            np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in w.items()})
        case _:
            order = np.asfortranarray if "columns" in file else np.asarray
            np.savez(path, **{name: order(tensor.numpy()) for name, tensor in w.items()})
    if "text" not in file:
        AutoSae.from_pretrained(path.parent)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"is damaged \(.*({reason}).*\). Fetch it again") as error:
        AutoSae.from_pretrained(path.parent)
    assert "\n" not in str(error.value)


def test_a_torch_file_that_was_written_without_checksums_is_read(tmp_path, w):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(_relu_state(w), tmp_path / "ae.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    assert torch.equal(AutoSae.from_pretrained(tmp_path).W_dec, w["W_dec"])


def test_llama_scope_transcoders_give_outputs_the_scale_of_outputs(tmp_path, w, x):
    reads, writes = D**0.5 / 7.0, D**0.5 / 3.0
    tensors = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    hooks = {"in": "blocks.8.ln2.hook_normalized", "out": "blocks.8.hook_mlp_out"}
    tensors |= {
        f"dataset_average_activation_norm.{hooks[side]}": torch.tensor(n) for side, n in (("in", 7.0), ("out", 3.0))
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    keys = {"act_fn": "relu", "hook_point_in": hooks["in"], "hook_point_out": hooks["out"], "d_model": D}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    head, acts = AutoSae.from_pretrained(tmp_path), _acts(w, x * reads, subtract=False)
    _agrees(head, x, acts, (acts @ w["W_dec"] + w["b_dec"]) / writes)
    assert isinstance(head, TranscoderModel)
    for norm, scale in (("inference", 1.0), ("token-wise", D**0.5 / x.norm(dim=-1, keepdim=True))):
        keys |= {"hook_point_out": hooks["in"], "norm_activation": norm}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        acts = _acts(w, x * scale, subtract=False)
        _agrees(AutoSae.from_pretrained(tmp_path), x, acts, (acts @ w["W_dec"] + w["b_dec"]) / scale)
    for change, message in (
        ({"norm_activation": "batch-wise"}, "normalised by 'batch-wise'"),
        ({"act_fn": "jumprelu"}, "has no threshold"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(keys | change))
        with pytest.raises(InputError, match=message):
            AutoSae.from_pretrained(tmp_path)


def test_arrays_that_lie_by_columns_and_in_other_precisions(tmp_path, w, x):
    root = tmp_path / "gemma-scope-2b-pt-res" / "layer_1" / "average_l0_5"
    root.mkdir(parents=True)
    by_columns = {name: np.asfortranarray(tensor.double().numpy()) for name, tensor in w.items()}
    np.savez(root / "params.npz", **by_columns)
    acts = _acts(w, x, subtract=False, gate=w["threshold"])
    head = AutoSae.from_pretrained(root, dtype=torch.float32)
    _agrees(head, x, acts, acts @ w["W_dec"] + w["b_dec"])
    assert AutoSae.from_pretrained(root).dtype == torch.float64
    np.savez(root / "params.npz", **{name: tensor.numpy().astype(">f4") for name, tensor in w.items()})
    _agrees(AutoSae.from_pretrained(root), x, acts, acts @ w["W_dec"] + w["b_dec"])


def test_folders_around_a_repo_have_no_say_in_what_it_is(tmp_path, w):
    for folder in ("transcoders-vs-saes/gpt2/results", "a"):
        _npz(tmp_path / folder / "gemma-scope-2b-pt-att" / "layer_5" / "average_l0_5", w)
        head = AutoSae.from_pretrained(tmp_path / folder / "gemma-scope-2b-pt-att")
        assert isinstance(head, SaeModel) and head.config.hookpoint is None


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"\x80\x02}q\x00"])
def test_torch_files_of_nothing_are_one_line(tmp_path, content):
    (tmp_path / "8.pt").write_bytes(content)
    with pytest.raises(InputError, match="does not hold only tensors") as error:
        AutoSae.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_what_torch_saved_beside_heads_is_no_head(tmp_path, w):
    SaeModel(SaeConfig(d_in=D, k=K)).save_pretrained(tmp_path / "layers.1")
    torch.save(w, tmp_path / "acts.pt")
    assert list(AutoSae.open(tmp_path)) == ["layers.1"]
    save_file(w, tmp_path / "layers.1" / "sae_weights.safetensors")
    (tmp_path / "layers.1" / "cfg.json").write_text('{"architecture": "standard"}')
    with pytest.raises(InputError, match="has two heads in one folder: layers.1/config.json"):
        AutoSae.open(tmp_path)


def test_arguments_that_nobody_reads_are_refused_with_the_nearest(tmp_path, w):
    torch.save(
        {n: t.T if n == "W_enc" else t for n, t in w.items()} | {"W_dec": w["W_dec"].T}, tmp_path / "layer7.sae.pt"
    )
    for given, message in (
        ({"hookpiont": "layers.7"}, "takes no argument 'hookpiont'. Did you mean hookpoint"),
        ({"d_in": 4}, "takes no argument 'd_in'"),
        ({"k": K, "input_scale": 2.0}, "input_scale was given"),
        ({"k": K, "hookpoint": "layers.9"}, "no head 'layers.9'"),
    ):
        with pytest.raises(InputError, match=message):
            AutoSae.from_pretrained(tmp_path, **given)
    assert AutoSae.from_pretrained(tmp_path, k=K, torch_dtype=torch.bfloat16).dtype == torch.bfloat16

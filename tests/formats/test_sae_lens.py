"""SAELens itself is the oracle, for its heads here and for ours there."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeModel, TranscoderModel


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

D, M, K = 12, 40, 3
pytestmark = pytest.mark.filterwarnings("ignore")


def _peer(folder, architecture: str, **options) -> SAE:
    torch.manual_seed(1)
    model_class, config_class = get_sae_class(architecture)
    sizes = {"d_out": 8} if "transcoder" in architecture else {}
    if "topk" in architecture:
        sizes["k"] = K
    metadata = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post"}
    config = config_class.from_dict(
        {"architecture": architecture, "d_in": D, "d_sae": M, "metadata": metadata, **sizes, **options}
    )
    sae = model_class(config)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_(std=0.4)
            if name == "threshold":
                parameter.abs_()
    sae.save_model(folder)
    return sae


def _edit(folder, **changes):
    keys = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))


def _dense(head, x: torch.Tensor) -> torch.Tensor:
    acts, indices = head.encode(x)
    return x.new_zeros(*x.shape[:-1], M).scatter_add_(-1, indices, acts)


def _same(sae, head, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected = sae(x)
        latents = sae.encode(x)
    latents = latents.to_dense() if latents.is_sparse else latents
    torch.testing.assert_close(head(x, return_loss=False).reconstruction, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_dense(head, x), latents, rtol=1e-5, atol=1e-5)


ARCHITECTURES = (
    "standard",
    "topk",
    "abstopk",
    "jumprelu",
    "gated",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)


OPTIONS = (
    {},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"apply_b_dec_to_input": False},
)
# SAELens does not undo the normalisation of transcoders, and they never take b_dec from their input.
CASES = [
    (architecture, options)
    for architecture in ARCHITECTURES
    for options in (OPTIONS if "transcoder" not in architecture else OPTIONS[3:])
]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_a_head_that_saelens_wrote_computes_the_same_here(tmp_path, architecture, options):
    sae = _peer(tmp_path, architecture, **options)
    head = AutoSae.from_pretrained(tmp_path)
    assert isinstance(head, TranscoderModel if "transcoder" in architecture else SaeModel)
    _same(sae, head, 2 * torch.randn(4, 5, D) + 0.5)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_latents_that_are_weighed_by_their_decoder_rows(tmp_path, architecture):
    sae = _peer(tmp_path, architecture, rescale_acts_by_decoder_norm=True)
    _same(sae, AutoSae.from_pretrained(tmp_path), torch.randn(30, D))


def test_the_average_norm_of_inputs_is_folded_into_the_weights(tmp_path):
    sae = _peer(tmp_path, "standard", normalize_activations="expected_average_only_in")
    with pytest.raises(InputError, match="Give it as input_scale"):
        AutoSae.from_pretrained(tmp_path)
    given = AutoSae.from_pretrained(tmp_path, input_scale=0.3)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.3}')
    found = AutoSae.from_pretrained(tmp_path)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"input_scale is {wrong}; it must be .* above 0"):
            AutoSae.from_pretrained(tmp_path, input_scale=wrong)
    sae.fold_activation_norm_scaling_factor(0.3)
    for head in (given, found):
        _same(sae, head, 3 * torch.randn(20, D))
    _edit(tmp_path, normalize_activations="none")
    with pytest.raises(InputError, match="input_scale was given"):
        AutoSae.from_pretrained(tmp_path, input_scale=0.3)


def test_files_of_before_version_six(tmp_path):
    sae = _peer(tmp_path, "topk")
    keys = {
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",
        "hook_point": "blocks.3.hook_resid_pre",
        "model_name": "gpt2-small",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(keys))
    head = AutoSae.from_pretrained(tmp_path)
    _same(sae, head, torch.randn(20, D))
    assert (head.config.hookpoint, head.config.aliases) == ("h.2", ["blocks.3.hook_resid_pre"])
    _edit(tmp_path, activation_fn_str="tanh-relu")
    with pytest.raises(InputError, match="its activation is 'tanh-relu'"):
        AutoSae.from_pretrained(tmp_path)


def test_old_thresholds_are_logarithms_and_those_of_batches_are_one_number(tmp_path):
    sae = _peer(tmp_path, "jumprelu")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    _same(sae, AutoSae.from_pretrained(tmp_path), torch.randn(20, D))
    tensors["topk_threshold"] = torch.tensor(0.25)
    del tensors["log_threshold"]
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    _edit(tmp_path, architecture="batchtopk", k=K)
    head = AutoSae.from_pretrained(tmp_path)
    assert head.config.activation == "batchtopk" and torch.equal(head.threshold, torch.full((M,), 0.25))


def test_hooks_are_our_names_where_the_lm_is_known_and_stay_as_aliases(tmp_path):
    for folder, hook in (("blocks.3.hook_resid_post", None), ("some_name", "blocks.5.hook_mlp_out")):
        _peer(tmp_path / "gpt2-small-res" / folder, "standard")
        if hook:
            metadata = {"model_name": "EleutherAI/pythia-70m", "hook_name": hook, "sae_lens_version": "6.54.0"}
            _edit(tmp_path / "gpt2-small-res" / folder, metadata=metadata)
    saes = AutoSae.from_pretrained(tmp_path / "gpt2-small-res")
    assert list(saes) == ["h.3", "some_name"]
    assert saes["blocks.3.hook_resid_post"] is saes["h.3"] and saes["h.3"].config.hookpoint == "h.3"
    assert saes["layers.5.mlp"] is saes["some_name"] is saes["blocks.5.hook_mlp_out"]
    assert saes["some_name"].config.aliases == ["blocks.5.hook_mlp_out", "some_name"]
    _edit(
        tmp_path / "gpt2-small-res" / "some_name", metadata={"model_name": "own", "hook_name": "blocks.5.hook_mlp_out"}
    )
    unknown = AutoSae.from_pretrained(tmp_path / "gpt2-small-res", hookpoint="some_name")
    assert unknown.config.hookpoint is None and "blocks.5.hook_mlp_out" in unknown.config.aliases


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "it is a 'temporal' of SAELens; standard, topk"),
        ({"normalize_activations": "covariance_whitening"}, "inputs are normalised by 'covariance_whitening'"),
        ({"d_sae": 41}, "says num_latents = 41, but its weights have 40"),
        ({"d_in": 13}, "says d_in = 13, but its weights have 12"),
        ({"d_in": "12"}, "says d_in = '12', a str, but its weights have 12"),
        ({"architecture": ["standard"]}, "it is a \\['standard'\\] of SAELens"),
    ],
)
def test_what_is_not_done_here_is_said(tmp_path, changes, message):
    _peer(tmp_path, "standard")
    _edit(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        AutoSae.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("jumprelu", "threshold"),
        ("gated", "b_gate, b_mag, r_mag"),
        ("skip_transcoder", "W_skip"),
        ("jumprelu_skip_transcoder", "W_skip, threshold"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, architecture, names):
    subtracts = "transcoder" not in architecture
    sae, x = _peer(tmp_path, architecture, apply_b_dec_to_input=subtracts), torch.randn(5, D)
    for keys, says in (("{}", "names no architecture"), ('{"architecture": "standard"}', "says 'standard'")):
        (tmp_path / "cfg.json").write_text(keys)
        with pytest.raises(InputError, match=f"{says}.* its weights hold {names}, which .* Set its architecture to"):
            AutoSae.from_pretrained(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": architecture, "apply_b_dec_to_input": subtracts}))
    _same(sae, AutoSae.from_pretrained(tmp_path), x)


def test_a_configuration_that_tells_nothing_is_of_a_standard_sae_as_wide_as_its_weights(tmp_path):
    sae = _peer(tmp_path, "standard")
    (tmp_path / "cfg.json").write_text("{}")
    _same(sae, AutoSae.from_pretrained(tmp_path), torch.randn(20, D))


def test_factors_of_an_old_fine_tuning_are_folded_into_the_decoder(tmp_path):
    sae = _peer(tmp_path, "standard")
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    factors = torch.rand(M) + 0.5
    save_file(tensors | {"scaling_factor": factors}, tmp_path / "sae_weights.safetensors")
    x = torch.randn(20, D)
    head = AutoSae.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(head(x).reconstruction, sae.decode(sae.encode(x) * factors), rtol=1e-5, atol=1e-5)
    save_file(tensors | {"scaling_factor": torch.ones(M)}, tmp_path / "sae_weights.safetensors")
    _same(sae, AutoSae.from_pretrained(tmp_path), x)

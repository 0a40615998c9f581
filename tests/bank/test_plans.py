import re

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from transformers import AutoModel, LlamaConfig

from sae_accel.bank.plans import plan_heads
from sae_accel.common.errors import InputError
from sae_accel.lm.hooks import Site
from sae_accel.lm.modules import layer_list, match_modules
from sae_accel.recipe.arguments import HeadArguments


NAMES = ["layers", "layers.0", "layers.0.mlp", "layers.0.mlp.act", "layers.1", "layers.10", "layers.10.mlp", "norm"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*", ["layers.0", "layers.1", "layers.10"]),
        ("layers.?", ["layers.0", "layers.1"]),
        ("layers.[12]", ["layers.1"]),
        ("layers.[!0]", ["layers.1"]),
        ("layers.[0-3].mlp", ["layers.0.mlp"]),
        ("**.mlp", ["layers.0.mlp", "layers.10.mlp"]),
        ("layers.**", NAMES[1:7]),
        ("layersx0", []),
        ("norm", ["norm"]),
    ],
)
def test_a_glob_stays_within_a_component_unless_it_is_doubled(pattern, expected):
    assert [name for name, _ in match_modules(pattern, NAMES)] == expected


@pytest.mark.parametrize("piece", ["[]", "[3-0]", "[!]"])
def test_brackets_without_a_set_of_characters_are_refused(piece):
    with pytest.raises(InputError, match=f"'{re.escape(piece)}' in a glob is no set of characters"):
        list(match_modules(f"layers.{piece}", NAMES))


def test_wildcards_are_kept_in_order():
    assert dict(match_modules("layers.*.m?p", NAMES))["layers.10.mlp"] == ["10", "l"]


def test_without_a_pattern_every_layer_gets_a_head():
    assert [plan.name for plan in plan_heads(tiny_llama(), [HeadArguments()])] == [f"layers.{i}" for i in range(4)]


def test_layers_name_the_outputs_of_layers_in_any_architecture():
    plans = plan_heads(tiny_gpt2(), [HeadArguments(layers=[2, 0])])
    assert [plan.name for plan in plans] == ["h.2", "h.0"]


def test_a_stride_counts_within_each_pattern_so_no_kind_of_module_vanishes():
    plans = plan_heads(tiny_llama(), [HeadArguments(hookpoints=["layers.*.mlp", "layers.*.self_attn"], stride=2)])
    assert [plan.name for plan in plans] == [
        "layers.0.mlp",
        "layers.2.mlp",
        "layers.0.self_attn",
        "layers.2.self_attn",
    ]


def test_widths_are_those_of_the_modules_own_input_and_output():
    plans = plan_heads(
        tiny_llama(),
        [
            HeadArguments(hookpoints="layers.1.mlp.down_proj", type="transcoder", expansion_factor=2),
            HeadArguments(hookpoints="layers.1.mlp.down_proj", name="sae", expansion_factor=2),
        ],
    )
    assert [(plan.config.d_in, plan.config.d_out, plan.config.num_latents) for plan in plans] == [
        (40, 24, 80),
        (24, 24, 48),
    ]


def test_source_names_another_module_by_what_the_wildcard_matched():
    entry = HeadArguments(hookpoints="layers.*.mlp", source="layers.{0}.post_attention_layernorm", type="transcoder")
    plan = plan_heads(tiny_llama(), [entry])[2]
    assert plan.reads == (Site("layers.2.post_attention_layernorm", "output"),)
    assert plan.predicts == (Site("layers.2.mlp", "output"),)
    assert plan.config.source == "layers.2.post_attention_layernorm"


def test_a_model_on_the_meta_device_gives_the_same_plans():
    config = tiny_llama().config
    with torch.device("meta"):
        empty = AutoModel.from_config(config)
    entries = [HeadArguments(hookpoints=["layers.*", "layers.*.self_attn"])]
    assert plan_heads(empty, entries) == plan_heads(tiny_llama(), entries)


def test_two_entries_at_one_hookpoint_make_two_heads():
    entries = [HeadArguments(layers=[1], k=4), HeadArguments(layers=[1], k=8, name="wide")]
    assert [plan.name for plan in plan_heads(tiny_llama(), entries)] == ["layers.1", "layers.1/wide"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(hookpoints="layers.*.mpl"), r"heads\[0\].*'layers.\*.mpl' matches no module.*layers.0.mlp"),
        (dict(hookpoints="layers"), "matches no module"),
        (dict(layers=[7]), r"heads\[0\].layers: LlamaModel has no layer 7; it has 0 to 3"),
        (dict(hookpoints="layers.*.mlp", source="layers.{1}.mlp", type="transcoder"), "asks for a wildcard"),
        (dict(hookpoints="layers.*.mlp", source="layers.{0}.nlp", type="transcoder"), "no module 'layers.0.nlp'"),
        (dict(layers=[1], k=97, expansion_factor=4), "k"),
        (dict(layers=[1], k=7, expansion_factor=4, activation="groupmax"), "groupmax"),
        (dict(layers=[1], k=32, expansion_factor=4, multi_topk=True), "multi_topk"),
        (dict(hookpoints="layers.1", name="a"), "Two heads are called 'layers.1/a'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(entry, message):
    with pytest.raises(InputError, match=message) as error:
        plan_heads(tiny_llama(), [HeadArguments(**entry), HeadArguments(layers=[1], name="a")])
    assert "\n" not in str(error.value)


def test_a_module_that_runs_twice_is_done_only_after_both_runs():
    lm = tiny_llama()
    lm.model.layers[2].mlp = lm.model.layers[1].mlp
    (plan,) = plan_heads(lm, [HeadArguments(hookpoints="layers.1.mlp")])
    assert plan.predicts == (Site("layers.1.mlp", "output", within=""),)


def test_an_lm_whose_layers_cannot_be_told_is_refused():
    lm = AutoModel.from_config(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2))
    lm.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="no list of 5 modules"):
        layer_list(lm)

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModel, GPT2Config, GPTNeoXConfig, LlamaConfig

from sae_accel.bank.plans import plan_heads
from sae_accel.recipe.recipe import load_recipe


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
LLAMA3 = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
ARCHITECTURES = {
    "quickstart": SMOLLM2,
    "smollm2": SMOLLM2,
    "smollm2-e2e": SMOLLM2,
    "smollm2-lora": SMOLLM2,
    "smollm2-activations": SMOLLM2,
    "pythia-160m": GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "gpt2": GPT2Config(),
    "llama3": LLAMA3,
    "llama3-all": LLAMA3,
}
HEADS = {
    "quickstart": ["layers.1", "layers.3", "layers.3.mlp"],
    "smollm2-e2e": ["layers.1", "layers.3", "layers.3.mlp"],
    "smollm2-lora": ["layers.3"],
    "smollm2-activations": ["layers.3/topk", "layers.3/batchtopk", "layers.3/jumprelu"],
    "smollm2": [f"layers.{i}" for i in range(0, 30, 3)],
    "pythia-160m": [f"layers.{i}.mlp" for i in range(12)] + ["layers.6/k32", "layers.6/k64", "layers.6/k128"],
    "gpt2": [f"h.{i}.attn" for i in range(12)] + [f"h.{i}.mlp.act" for i in range(12)],
    "llama3": ["layers.16", "layers.24"],
    "llama3-all": [f"layers.{i}" for i in range(0, 32, 2)],
}


def test_every_recipe_is_known_here():
    assert {path.stem for path in RECIPES} == set(ARCHITECTURES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_makes_its_heads_on_the_real_architecture(path):
    with torch.device("meta"):
        model = AutoModel.from_config(ARCHITECTURES[path.stem])
    recipe = load_recipe(path)
    assert [plan.name for plan in plan_heads(model, recipe.heads)] == HEADS[path.stem]


def test_each_accelerate_configuration_is_one_of_a_way_to_spread_heads():
    folder = Path(__file__).parents[2] / "recipes" / "accelerate"
    kinds = {path.stem: load_config_from_file(str(path)).distributed_type for path in folder.glob("*.yaml")}
    zero = dict.fromkeys(("zero1", "zero2", "zero3"), "DEEPSPEED")
    assert kinds == {"ddp": "MULTI_GPU", "nodes": "MULTI_GPU", "fsdp": "FSDP"} | zero
    for stage in (1, 2, 3):
        assert load_config_from_file(str(folder / f"zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage


def test_llama_heads_are_as_wide_as_the_published_ones():
    with torch.device("meta"):
        model = AutoModel.from_config(ARCHITECTURES["llama3"])
    plans = plan_heads(model, load_recipe("recipes/llama3.yaml").heads)
    assert [(plan.config.d_in, plan.config.num_latents, plan.config.k) for plan in plans] == [(4096, 131072, 192)] * 2

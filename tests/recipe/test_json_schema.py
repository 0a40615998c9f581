import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from sae_accel.common.errors import InputError
from sae_accel.recipe.json_schema import json_schema, json_schema_text
from sae_accel.recipe.recipe import Recipe
from sae_accel.train import main


RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMA = json.loads((RECIPES / "schema.json").read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def test_the_shipped_schema_is_the_one_that_the_command_prints(capsys):
    assert main(["--schema"]) == 0
    assert (RECIPES / "schema.json").read_text() == capsys.readouterr().out == json_schema_text() + "\n"


def test_it_is_a_schema():
    jsonschema.Draft7Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    content = yaml.safe_load(path.read_text())
    VALIDATOR.validate(content)
    VALIDATOR.validate(Recipe.from_dict(content).to_dict())


def test_the_defaults_are_valid():
    VALIDATOR.validate(Recipe().to_dict())
    VALIDATOR.validate({"lora": {}, "training": {"loss": "kl"}})


@pytest.mark.parametrize(
    "text",
    [
        "heads: [{hookpoints: layers.1}]",
        "heads: [{hookpoints: [layers.1, layers.2], layers: []}]",
        "training: {resume_from_checkpoint: true, report_to: none}",
        "training: {resume_from_checkpoint: runs/a/checkpoint-3}",
        "model: {device_map: {embed_tokens: 0, layers: cpu}}",
        "model: {device_map: auto, max_memory: {cpu: 60GiB}}",
        "model: {quantization: null}",
        "data: {separator: 3}",
        "data: {shuffle_seed: null, load_args: {revision: main}}",
        "training: {learning_rate: 1.0e-3, warmup_steps: 3}",
    ],
)
def test_what_our_reader_takes_it_takes(text):
    content = yaml.safe_load(text)
    Recipe.from_dict(content)
    VALIDATOR.validate(content)


@pytest.mark.parametrize(
    "text",
    [
        # Mistyped keys.
        "modle: {}",
        "model: {name: gpt2}",
        "data: {contextlen: 3}",
        "heads: [{num_latnets: 3}]",
        "lora: {r: 3}",
        "training: {max_step: 3}",
        # Wrong types.
        "model: []",
        "model: {shard: 1}",
        "model: {dtype: float8}",
        "model: {quantization: 2bit}",
        "data: {ctx_len: long}",
        "data: {exclude_tokens: [a]}",
        "data: {load_args: main}",
        "heads: {k: 3}",
        "heads: []",
        "heads: [3]",
        "heads: [{k: 3.5}]",
        "heads: [{k: true}]",
        "heads: [{hookpoints: [1]}]",
        "heads: [{type: decoder}]",
        "training: {output_dir: null}",
        "training: {learning_rate: high}",
        "training: {optim: sgd}",
        # Out of range.
        "data: {ctx_len: 1}",
        "data: {max_bad_rows: -0.1}",
        "heads: [{k: 0}]",
        "heads: [{sparsity_weight: 0}]",
        "heads: [{learning_rate: 0.0}]",
        "lora: {rank: 0}",
        "training: {seed: 4294967296}",
        "training: {hub_timeout: 0}",
    ],
)
def test_what_our_reader_refuses_it_refuses(text):
    content = yaml.safe_load(text)
    with pytest.raises(InputError):
        Recipe.from_dict(content)
    assert not VALIDATOR.is_valid(content)

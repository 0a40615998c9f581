"""How a run may differ from the checkpoint that it goes on from, field by field."""

import copy
from dataclasses import fields

import pytest
from tiny import command_words, forbid_loading, tiny_tokens, tiny_trainer

from sae_accel.common.errors import InputError
from sae_accel.data.batches import Position
from sae_accel.recipe.arguments import SECTIONS, HeadArguments, LoraArguments, SaeTrainingArguments, secret_fields
from sae_accel.recipe.recipe import Recipe
from sae_accel.runs.differences import Differences
from sae_accel.train import main
from sae_accel.training.identity import identity_of


# By what happens, the fields; all others are told among the changes.
NEEDS_LEAVE = {
    *("model.name_or_path", "model.revision", "model.dtype", "model.quantization", "model.adapter", "model.gguf_file"),
    *("data.exclude_tokens", "heads.k", "lora.alpha", "training.loss", "training.seed"),
}
OTHER_ROWS = {f"data.{name}" for name in ("path", "name", "split", "load_args", "streaming", "text_column")}
OTHER_ROWS |= {"data.sample_by", "data.separator", "data.token_dtype", "data.ctx_len", "data.shuffle_seed"}
NEVER = {f"heads.{name}" for name in ("type", "source", "activation", "num_latents", "skip_connection")}
NEVER |= {"heads.normalize_decoder", "lora.rank", "lora.target_modules", "lora.train_heads", "training.optim"}
FIELDS = [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section)]


@pytest.fixture(scope="module")
def identity():
    trainer = tiny_trainer("unused", heads=[HeadArguments(hookpoints="layers.[012]", k=4, expansion_factor=4)])
    plans = trainer.plans.values()
    return identity_of(plans, trainer.args, LoraArguments(), trainer.activations.base_model, Recipe())


def _changed(identity: dict, field: str, heads: int = 3) -> dict:
    section, name = field.split(".")
    other = copy.deepcopy(identity)
    for part in list(other["heads"].values())[:heads] if section == "heads" else [other[section]]:
        part[name] = "something else"
    return other


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_may_differ_as_its_kind_says(identity, field):
    section, name = field.split(".")
    if name in secret_fields(SECTIONS[section]()):
        assert name not in identity[section]
        return
    theirs = _changed(identity, field)
    found, allowed = (Differences.between(theirs, identity, leave) for leave in ([], [field]))
    assert (field in found.refused) == (field in NEEDS_LEAVE | OTHER_ROWS | NEVER)
    assert (field in allowed.refused) == (field in NEVER)
    tells = field == "data.eval_examples"
    assert allowed.moves == (field in OTHER_ROWS or tells) and (field in found.told) == tells
    assert not Differences.between(identity, identity).changed
    if field in NEVER | NEEDS_LEAVE | OTHER_ROWS:
        words = f"{field} something else, this run has "
        with pytest.raises(InputError, match=words) as refused:
            found.refuse("run/checkpoint-3")
        assert ("training.allow_changes" in str(refused.value)) == (field not in NEVER)


def test_heads_that_differ_alike_are_told_once_and_others_by_name(identity):
    once = Differences.between(_changed(identity, "heads.k"), identity).refused["heads.k"]
    some = Differences.between(_changed(identity, "heads.k", heads=2), identity).refused["heads.k"]
    assert once == "something else, this run has 4"
    assert some == "something else, this run has 4 (heads: layers.0, layers.1)"


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ({}, {"heads.activation": "batchtopk"}, "heads.activation topk, this run has batchtopk"),
        ({}, {"heads.expansion_factor": 8}, "heads.num_latents 96, this run has 192"),
        ({}, {"heads.hookpoints": "layers.1"}, "heads layers.1, layers.2, this run has layers.1"),
        ({"heads.type": "transcoder"}, {"heads.source": "layers.0"}, "this run has the output of layers.0"),
        ({}, {"heads.type": "transcoder"}, "heads.type sae, this run has transcoder"),
        ({}, {"training.loss": "ce"}, "training.loss fvu, this run has ce"),
        ({}, {"data.shuffle_seed": 1}, "data.shuffle_seed 42, this run has 1"),
        ({}, {"data.ctx_len": 8}, "data.ctx_len 16, this run has 8"),
    ],
)
def test_another_recipe_is_refused_before_the_lm_is_read(place, tmp_path, capsys, monkeypatch, first, then, says):
    assert main(command_words(place, tmp_path, **first)) == 0
    forbid_loading(monkeypatch)
    again = command_words(place, tmp_path, **first, **then, **{"training.resume_from_checkpoint": "true"})
    assert main(again) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error and "comes from another recipe" in error


def test_changes_that_may_be_made_are_told_and_those_that_are_allowed_take_effect(place, tmp_path, capsys):
    assert main(command_words(place, tmp_path)) == 0
    changes = {"training.max_steps": 5, "training.learning_rate": 0.01, "data.eval_examples": 16, "heads.k": 6}
    resumed = changes | {"training.resume_from_checkpoint": "true", "training.allow_changes": "heads.k"}
    assert main(command_words(place, tmp_path, **resumed)) == 0
    said = capsys.readouterr().err
    assert "training.max_steps 3, this run has 5" in said and "heads.k 4, this run has 6" in said
    assert (
        "data.eval_examples 8, this run has 16: the checkpoint may have trained on sequences that are held out" in said
    )


def test_data_that_are_allowed_to_be_others_are_read_from_their_start(tmp_path):
    first = tiny_trainer(tmp_path, max_steps=3)
    first.train()
    read = []

    class Rows(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rows = Rows(tiny_tokens(32, seed=9).to_list())
    second = tiny_trainer(tmp_path, train=rows, max_steps=4, allow_changes=["data.path"])
    first.run_state.identity["data"] = {"path": "a"}
    first.run_state.save_checkpoint(Position(0, 3))
    second.run_state.identity["data"] = {"path": "b"}
    second.train(resume_from_checkpoint=True)
    assert read[-4:] == [0, 1, 2, 3]


def test_what_cannot_be_allowed_is_refused_by_name():
    for name, says in (("heads.activation", "cannot change"), ("training.save_steps", "may always change")):
        with pytest.raises(InputError, match=f"training.allow_changes: {name} {says}"):
            Recipe(training=SaeTrainingArguments(allow_changes=[name]))
    with pytest.raises(InputError, match="Did you mean data.path"):
        Recipe(training=SaeTrainingArguments(allow_changes=["data.paths"]))

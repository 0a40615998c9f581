from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Literal, get_args, get_origin

import pytest
import yaml

from sae_accel.command_line import help_text, parse_command_line
from sae_accel.errors import InputError
from sae_accel.recipe import SECTIONS, Recipe, default_of, field_hints, is_union, load_recipe


def _write(path, text):
    path.write_text(text)
    return str(path)


def _other_value(hint, default):
    """A value of the type that is not the default."""
    if is_union(hint):
        hint = [part for part in get_args(hint) if part is not NoneType][-1]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != default)
    if get_origin(hint) is list:
        return [11, 12] if get_args(hint)[0] is int else ["wandb", "mlflow"]
    return {int: 7, float: 0.25, str: "x1", bool: not default, dict: {"a": 1}}[get_origin(hint) or hint]


EVERY_FIELD = [
    (section, option.name, _other_value(field_hints(arguments)[option.name], default_of(option)))
    for section, arguments in SECTIONS.items()
    for option in fields(arguments)
]
# Some fields make sense only beside another.
COMPANIONS = {
    "num_latents": {"k": 4},
    "source": {"type": "transcoder"},
    "skip_connection": {"type": "transcoder"},
    "lr_scheduler_type": {"optim": "adam"},
}


def _read(recipe, section, name):
    return getattr(recipe.heads[0] if section == "heads" else getattr(recipe, section), name)


@pytest.mark.parametrize(("section", "name", "value"), EVERY_FIELD)
def test_every_field_can_be_set_from_yaml_and_from_the_command_line(tmp_path, section, name, value):
    value = "cosine" if name == "lr_scheduler_type" else value
    content = {**COMPANIONS.get(name, {}), name: value}
    recipe = Recipe.from_dict({section: [content] if section == "heads" else content})
    words = []
    for key, one in content.items():
        shown = (
            [str(item) for item in one] if isinstance(one, list) else [yaml.safe_dump(one, default_flow_style=True)]
        )
        words += [f"--{section}.{key}", *(word.removesuffix("\n...\n").strip() for word in shown)]
    assert _read(recipe, section, name) == _read(parse_command_line(words), section, name) == value
    assert f"--{section}.{name} " in help_text(100)


def test_a_recipe_survives_being_saved_but_its_token_does_not(tmp_path):
    recipe = parse_command_line(["--model.token", "secret", "--heads.k", "8", "--training.learning_rate", "1e-3"])
    recipe.save(tmp_path / "recipe.yaml")
    assert "secret" not in (tmp_path / "recipe.yaml").read_text()
    recipe.model.token = None
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert is_dataclass(recipe) and recipe.training.learning_rate == 1e-3


def test_a_value_for_heads_goes_to_all_entries_or_to_the_one_named(tmp_path):
    path = _write(tmp_path / "r.yaml", "heads:\n  - {layers: [1], k: 4}\n  - {layers: [2], k: 4}\n")
    assert [entry.k for entry in parse_command_line([path, "--heads.k", "9"]).heads] == [9, 9]
    assert [entry.k for entry in parse_command_line([path, "--heads.1.k=9"]).heads] == [4, 9]
    with pytest.raises(InputError, match="2 entries"):
        parse_command_line([path, "--heads.2.k", "9"])


def test_flags_alone_make_a_run():
    recipe = parse_command_line(
        ["--model.name_or_path", "123", "--heads.hookpoints", "h.*.attn", "h.*.mlp.act", "--data.streaming"]
    )
    assert recipe.model.name_or_path == "123" and recipe.data.streaming is True
    assert recipe.heads[0].hookpoints == ["h.*.attn", "h.*.mlp.act"]


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert Recipe.from_dict({"training": {"learning_rate": "1e-3"}}).training.learning_rate == 1e-3
    assert Recipe.from_dict({"training": {"learning_rate": 1}}).training.learning_rate == 1.0


def test_one_glob_needs_no_list():
    assert Recipe.from_dict({"heads": [{"hookpoints": "h.*"}]}).heads[0].hookpoints == ["h.*"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads:\n  - {num_latnets: 4}", r"heads\[0\].num_latnets: there is no such key. Did you mean num_latents"),
        ("training: {k: 4}", "training.k: there is no such key. It belongs under heads"),
        ("modle: {}", "modle: there is no such key. Did you mean model"),
        ("heads:\n  - {k: '4'}", r"heads\[0\].k: expected integer, found '4' \(string\)"),
        ("heads:\n  - {k: 4.0}", "expected integer, found 4.0"),
        ("heads:\n  - {k: true}", "expected integer, found True"),
        ("heads:\n  - {k: -4}", r"heads\[0\].k: found -4, the least allowed is 1"),
        ("heads:\n  - {k: null}", "expected integer, found None"),
        ("heads:\n  - {multi_topk: 1}", "expected true or false, found 1"),
        ("heads: {k: 4}", "heads: expected a list of entries, each after a dash"),
        ("heads: []", "expected a list of entries"),
        ("model: [a]", "model: expected a mapping"),
        ("data: {exclude_tokens: [a]}", r"data.exclude_tokens\[0\]: expected integer, found 'a'"),
        ("training: {optim: sgd}", "found 'sgd' .*allowed are signum, adam, adam8bit, muon"),
        ("training: {learning_rate: fast}", "expected number or null|expected number, found 'fast'"),
        ("training: {learning_rate: 0}", "it must be above 0"),
        ("training: {report_to: tensorbord}", "no tracker of Accelerate. Did you mean tensorboard"),
        ("training: {report_to: [none, wandb]}", "none does not go with other trackers"),
        ("training: {lr_scheduler_type: linaer, optim: adam}", "no schedule of transformers"),
        ("training: {lr_scheduler_type: reduce_lr_on_plateau, optim: adam}", "needs arguments"),
        ("training: {lr_scheduler_type: linear}", "signum is schedule-free"),
        ("training: {max_steps: 5, warmup_steps: 5}", "not below training.max_steps"),
        ("heads:\n  - {hookpoints: a, layers: [1]}", "hookpoints and layers are two ways"),
        ("heads:\n  - {source: a}", "only a transcoder has one"),
        ("heads:\n  - {skip_connection: true}", "only a transcoder has one"),
        ("heads:\n  - {type: transcoder, normalize_decoder: true}", "starts at zero"),
        ("heads:\n  - {k: 9, num_latents: 8}", "k is 9, but the head has 8 latents"),
        ("heads:\n  - {k: 3, num_latents: 8, activation: groupmax}", "does not divide"),
        ("heads:\n  - {k: 3, num_latents: 8, multi_topk: true}", "selects 4 . k = 12 latents"),
        ("heads:\n  - {activation: groupmax, multi_topk: true}", "goes with activation topk"),
        ("heads:\n  - {name: a/b}", "cannot be the name of a folder"),
        ("heads:\n  - {k: 4, k: 5}", "line 2, column 12: key 'k' stands twice"),
        ("heads: [", "not YAML, line"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_that_names_the_file(tmp_path, text, message):
    path = _write(tmp_path / "bad.yaml", text)
    with pytest.raises(InputError, match=message) as error:
        load_recipe(path)
    assert "bad.yaml" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_recipes_are_refused(tmp_path):
    _write(tmp_path / "llama3.yaml", "model: {}")
    with pytest.raises(InputError, match="there are: llama3.yaml"):
        load_recipe(tmp_path / "lama3.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text in UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give a recipe"),
        (["--trainng.optim", "adam"], "options are --section.field"),
        (["--training", "adam"], "options are --section.field"),
        (["--heads.k", "1", "2"], "expected one value"),
        (["--heads.kk", "3"], "Did you mean k"),
        (["--heads.k", "-3"], "the least allowed is 1"),
        (["--data.load_args", "{"], "is not a value"),
    ],
)
def test_wrong_command_lines_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_command_line(words)


def test_arguments_of_load_dataset_can_be_given_one_by_one():
    recipe = parse_command_line(["--data.load_args", "{a: 1}", "--data.load_args.data_files", "x.txt"])
    assert recipe.data.load_args == {"a": 1, "data_files": "x.txt"}


def test_help_is_printed_and_ends_the_program(capsys):
    with pytest.raises(SystemExit) as end:
        parse_command_line(["recipes/x.yaml", "--help"])
    assert end.value.code == 0 and "accelerate launch -m sae_accel.train" in capsys.readouterr().out

import re
import shlex
from dataclasses import fields
from types import NoneType
from typing import Literal, get_args, get_origin

import pytest
import torch
import yaml
from transformers import SchedulerType, get_scheduler

from sae_accel.common.errors import InputError
from sae_accel.recipe.arguments import (
    SECTIONS,
    DataArguments,
    HeadArguments,
    ModelArguments,
    SaeTrainingArguments,
)
from sae_accel.recipe.checks import SCHEDULES, check_latents
from sae_accel.recipe.command_line import USAGE, help_text, parse_command_line, split_dry_run
from sae_accel.recipe.overrides import with_values
from sae_accel.recipe.recipe import Recipe, load_recipe
from sae_accel.recipe.schema import default_of, field_hints, is_union, type_name
from sae_accel.train import main


def _write(path, text):
    path.write_text(text, encoding="utf-8")
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


# Of strings that are not free.
NAMES = {"allow_changes": ["data.path", "heads.k"]}
EVERY_FIELD = [
    (
        section,
        option.name,
        NAMES.get(option.name) or _other_value(field_hints(arguments)[option.name], default_of(option)),
    )
    for section, arguments in SECTIONS.items()
    for option in fields(arguments)
]
# Some fields make sense only beside another.
COMPANIONS = {
    "num_latents": {"heads": {"k": 4}},
    "source": {"heads": {"type": "transcoder"}},
    "skip_connection": {"heads": {"type": "transcoder"}},
    "hub_model_id": {"training": {"push_to_hub": True}},
    "hub_private_repo": {"training": {"push_to_hub": True}},
    "hub_strategy": {"training": {"push_to_hub": True}},
    "hub_timeout": {"training": {"push_to_hub": True}},
    "sparsity_weight": {"heads": {"activation": "jumprelu"}},
    "max_memory": {"model": {"device_map": "auto"}},
    "lr_scheduler_type": {"training": {"optim": "adam"}},
    "max_grad_norm": {"training": {"optim": "adam"}},
    "fvu_weight": {"training": {"loss": "ce"}},
    "save_best": {"training": {"eval_steps": 5}},
}
LORA = {"lora": {"train_heads": True}, "training": {"loss": "kl"}}


def _read(recipe, section, name):
    return getattr(recipe.heads[0] if section == "heads" else getattr(recipe, section) or SECTIONS[section](), name)


def _with_companions(section, name, value):
    """A recipe that sets a field, and what it needs."""
    content = {key: dict(fields) for key, fields in (LORA if section == "lora" else COMPANIONS.get(name, {})).items()}
    content.setdefault(section, {})[name] = value
    if section == "lora" and name == "train_heads" and not value:
        content["training"]["init_from"] = "x"
    return content


def _words(value):
    """A value as it is typed."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return [yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()]


@pytest.mark.parametrize(("section", "name", "value"), EVERY_FIELD)
def test_every_field_can_be_set_from_yaml_and_from_the_command_line(tmp_path, section, name, value):
    value = "cosine" if name == "lr_scheduler_type" else value
    assert value != _read(Recipe(), section, name)
    content = _with_companions(section, name, value)
    whole = {key: [fields] if key == "heads" else fields for key, fields in content.items()}
    from_yaml = load_recipe(_write(tmp_path / "r.yaml", yaml.safe_dump(whole)))
    words = [
        word
        for key, part in content.items()
        for field, one in part.items()
        for word in (f"--{key}.{field}", *_words(one))
    ]
    from_words = parse_command_line(words)
    for recipe in (Recipe.from_dict(whole), from_yaml, from_words):
        found = _read(recipe, section, name)
        assert (found, type(found)) == (value, type(value))
    from_words.save(tmp_path / "saved.yaml")
    assert _read(load_recipe(tmp_path / "saved.yaml"), section, name) == (None if name == "token" else value)


@pytest.mark.parametrize("text", ["123", "1e-3", "null", "yes", "", "# x", "a: b", "é 🙂", "x\ny", "2020-01-01", "*a"])
def test_a_saved_recipe_gives_back_the_same_strings(tmp_path, text):
    recipe = Recipe(
        model=ModelArguments(name_or_path=text, revision=text),
        data=DataArguments(load_args={"data_files": {text: [text, 1, None]}}, exclude_tokens=[1, 2]),
        heads=[HeadArguments(hookpoints=[text, "h.*"], learning_rate=1e-7), HeadArguments(layers=[3])],
        training=SaeTrainingArguments(resume_from_checkpoint=text, learning_rate=1e22),
    )
    recipe.save(tmp_path / "new" / "recipe.yaml")
    assert load_recipe(tmp_path / "new" / "recipe.yaml") == recipe


def test_a_saved_recipe_holds_every_field_in_order_but_no_secret(tmp_path):
    recipe = parse_command_line(["--model.token", "hf_secret", "--heads.k", "8"])
    recipe.save(tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert "hf_secret" not in text and "token:" not in text
    saved = yaml.safe_load(text)
    assert list(saved) == ["model", "data", "heads", "training"]
    for section, arguments in SECTIONS.items():
        if section not in saved:
            continue
        names = [option.name for option in fields(arguments) if option.name != "token"]
        assert list(saved[section][0] if section == "heads" else saved[section]) == names


def test_a_value_for_heads_goes_to_all_entries_or_to_the_one_named(tmp_path):
    path = _write(tmp_path / "r.yaml", "heads:\n  - {layers: [1], k: 4}\n  - {layers: [2], k: 4}\n")
    assert [entry.k for entry in parse_command_line([path, "--heads.k", "9"]).heads] == [9, 9]
    assert [entry.k for entry in parse_command_line([path, "--heads.1.k=9"]).heads] == [4, 9]
    with pytest.raises(InputError, match=r"'heads.2.k': the recipe has no heads\[2\]; it has 2, counted from 0"):
        parse_command_line([path, "--heads.2.k", "9"])


def test_flags_alone_make_a_run():
    recipe = parse_command_line(
        ["--model.name_or_path", "123", "--heads.hookpoints", "h.*.attn", "h.*.mlp.act", "--data.streaming"]
    )
    assert recipe.model.name_or_path == "123" and recipe.data.streaming is True
    assert [entry.hookpoints for entry in recipe.heads] == [["h.*.attn", "h.*.mlp.act"]]


def test_missing_sections_have_their_defaults(tmp_path):
    assert load_recipe(_write(tmp_path / "r.yaml", "{}")) == Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"training": {"seed": 1}}).heads == [HeadArguments()]


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        (["--model.name_or_path", "null"], "model", "name_or_path", "null"),
        (["--model.name_or_path", "1e3"], "model", "name_or_path", "1e3"),
        (["--model.revision", "main", "--model.revision", "null"], "model", "revision", None),
        (["--model.revision", "-x"], "model", "revision", "-x"),
        (["--model.revision=--x=y"], "model", "revision", "--x=y"),
        (["--data.shuffle_seed", "5"], "data", "shuffle_seed", 5),
        (["--data.shuffle_seed", "null"], "data", "shuffle_seed", None),
        (["--data.streaming=false"], "data", "streaming", False),
        (["--data.streaming", "--data.num_proc", "2"], "data", "streaming", True),
        (["--data.exclude_tokens", "1", "2"], "data", "exclude_tokens", [1, 2]),
        (["--data.exclude_tokens"], "data", "exclude_tokens", []),
        (["--heads.k", "3", "--heads.k=4"], "heads", "k", 4),
        (["--heads.hookpoints=a", "b"], "heads", "hookpoints", ["a", "b"]),
        (["--heads.hookpoints", "[01]", "null"], "heads", "hookpoints", ["[01]", "null"]),
        (["--heads.normalize_decoder"], "heads", "normalize_decoder", True),
        (["--heads.normalize_decoder", "null"], "heads", "normalize_decoder", None),
        (["--training.learning_rate", "1e-3"], "training", "learning_rate", 1e-3),
        (["--training.resume_from_checkpoint"], "training", "resume_from_checkpoint", True),
        (["--training.resume_from_checkpoint", "True"], "training", "resume_from_checkpoint", True),
        (["--training.resume_from_checkpoint", "1"], "training", "resume_from_checkpoint", "1"),
        (["--training.report_to", "none"], "training", "report_to", ["none"]),
    ],
)
def test_words_are_read_by_the_type_of_the_field(words, section, name, value):
    found = _read(parse_command_line(words), section, name)
    assert (found, type(found)) == (value, type(value))


def test_overrides_replace_the_values_of_a_file_and_change_no_mapping(tmp_path):
    path = _write(tmp_path / "r.yaml", "heads: [{layers: [1]}, {layers: [2]}]\ndata: {load_args: {a: 1}}")
    overrides = [("heads.k", 9), ("heads.1.k", 5), ("data.load_args.b.c", 2)]
    recipe = load_recipe(path, overrides)
    assert [entry.k for entry in recipe.heads] == [9, 5]
    assert recipe.data.load_args == {"a": 1, "b": {"c": 2}}
    content = {"heads": [{"k": 1}], "data": {"load_args": {}}}
    with_values(content, overrides[:1] + overrides[2:])
    assert content == {"heads": [{"k": 1}], "data": {"load_args": {}}}


def test_an_error_begins_with_where_the_recipe_comes_from(tmp_path):
    for origin, read in {
        "recipe": lambda: Recipe.from_dict({"heads": [{"k": 0}]}),
        "here": lambda: Recipe.from_dict({"heads": [{"k": 0}]}, origin="here"),
        "command line": lambda: parse_command_line(["--heads.k", "0"]),
        f"{tmp_path}/r.yaml with overrides": lambda: load_recipe(_write(tmp_path / "r.yaml", "{}"), [("heads.k", 0)]),
    }.items():
        with pytest.raises(InputError, match=rf"^{re.escape(origin)}: heads\[0\].k: found 0"):
            read()


@pytest.mark.parametrize("schedule", [schedule.value for schedule in SchedulerType])
def test_the_schedules_that_are_allowed_are_those_that_need_no_more(schedule):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    try:
        scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=10)
        optimizer.step()
        scheduler.step()
        works = True
    except (TypeError, ValueError):
        works = False
    assert works == (schedule in SCHEDULES)


@pytest.mark.parametrize("schedule", [None, "constant", "constant_with_warmup"])
def test_signum_goes_with_constant_schedules(schedule):
    assert Recipe(training=SaeTrainingArguments(lr_scheduler_type=schedule)).training.optim == "signum"


def test_a_warmup_below_one_is_a_part_of_the_run():
    assert Recipe(training=SaeTrainingArguments(max_steps=1, warmup_steps=0.5)).training.warmup_steps == 0.5


def test_yaml_merge_keys_are_read(tmp_path):
    text = "heads:\n  - &first {layers: [1], k: 4}\n  - {<<: *first, layers: [2]}\n"
    assert load_recipe(_write(tmp_path / "r.yaml", text)).heads[1] == HeadArguments(layers=[2], k=4)


def test_latents_are_checked_as_far_as_their_number_is_known():
    check_latents(4, 16, "topk", True, "here")
    check_latents(4, 4, "topk", False, "here")
    check_latents(4, 16, "groupmax", False, "here")
    check_latents(99, None, "groupmax", False, "here")
    with pytest.raises(InputError, match="^here: k is 5, but the head has 4 latents"):
        check_latents(5, 4, "topk", False, "here")
    with pytest.raises(InputError, match="^here.multi_topk: it needs activation topk"):
        check_latents(4, None, "groupmax", True, "here")


def test_a_secret_is_not_shown_in_an_error():
    with pytest.raises(
        InputError, match="model.token: expected string or null, found a value of another type"
    ) as error:
        Recipe.from_dict({"model": {"token": ["hf_secret"]}})
    assert "hf_secret" not in str(error.value)


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert Recipe.from_dict({"training": {"learning_rate": "1e-3"}}).training.learning_rate == 1e-3
    assert Recipe.from_dict({"training": {"learning_rate": 1}}).training.learning_rate == 1.0


def test_one_glob_needs_no_list():
    assert Recipe.from_dict({"heads": [{"hookpoints": "h.*"}]}).heads[0].hookpoints == ["h.*"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads: [{num_latnets: 4}]", r"heads\[0\].num_latnets: there is no such key. Did you mean num_latents\?"),
        ("heads: [{layers: [1]}, {num_latnets: 4}]", r"heads\[1\].num_latnets: "),
        ("model: {dtipe: auto}", "Did you mean dtype.* Allowed are name_or_path, revision"),
        ("training: {k: 4}", "training.k: there is no such key. It belongs under heads"),
        ("training: {num_latnets: 4}", "Did you mean num_latents, under heads"),
        ("model: {seed: 4}", "model.seed: there is no such key. It belongs under heads or training"),
        ("max_steps: 4", "max_steps: there is no such key. It belongs under training"),
        ("training: {heads: []}", "training.heads: there is no such key. It is a section of its own"),
        ("modle: {}", "modle: there is no such key. Did you mean model"),
        ("1: {}", "1: there is no such key. Allowed are model, data, heads, lora, training"),
        ('"a\\nb": {}', "'a.nb': there is no such key"),
        ("heads: [{k: '4'}]", r"heads\[0\].k: expected integer, found '4' \(string\)"),
        ("heads: [{k: 4.0}]", "expected integer, found 4.0"),
        ("heads: [{k: true}]", "expected integer, found True"),
        ("heads: [{k: -4}]", r"heads\[0\].k: found -4, the least allowed is 1"),
        ("heads: [{k: null}]", "expected integer, found null"),
        ("heads: [{num_latents: a}]", "expected integer or null, found 'a'"),
        ("heads: [{multi_topk: 1}]", "expected true or false, found 1"),
        ("heads: [{hookpoints: 3}]", "expected list of strings, found 3"),
        ("heads: [{hookpoints: [3]}]", r"hookpoints\[0\]: expected string, found 3"),
        ("heads: {k: 4}", "heads: expected a list of entries, each after a dash, found {'k': 4}"),
        ("heads: []", "expected a list of entries"),
        ("heads:", "expected a list of entries, each after a dash, found null"),
        ("heads: [3]", r"heads\[0\]: expected a mapping"),
        ("model: [a]", "model: expected a mapping"),
        ("model:", "model: expected a mapping of keys to values, found null"),
        ("model: {revision: 2020-01-01}", r"expected string or null, found .* \(date\)"),
        ("data: {exclude_tokens: [a]}", r"data.exclude_tokens\[0\]: expected integer, found 'a'"),
        ("data: {exclude_tokens: a}", "data.exclude_tokens: expected list of integers, found 'a'"),
        ("data: {load_args: {1: 2}}", "data.load_args: its keys must be strings, found 1"),
        ("data: {load_args: [a]}", "data.load_args: expected mapping, found"),
        ("data: {token_dtype: uint8}", "expected one of uint16, uint32 or null, found 'uint8' .string.. Did you mean"),
        ("training: {optim: adm}", "one of signum, adam, adam8bit, muon, found 'adm' .string.. Did you mean adam"),
        ("training: {optim: [adam]}", "one of signum, adam, adam8bit, muon, found .'adam'."),
        ("training: {resume_from_checkpoint: 1}", "expected true, false or string, found 1"),
        ("training: {learning_rate: fast}", "expected number or null, found 'fast'"),
        ("training: {learning_rate: true}", "expected number or null, found True"),
        ("training: {learning_rate: 0}", "it must be above 0"),
        ("training: {learning_rate: .inf}", "found inf, it must be finite"),
        ("training: {warmup_steps: .nan}", "found nan, it must be finite"),
        (f"training: {{warmup_steps: {10**400}}}", "expected number or null"),
        ("training: {report_to: tensorbord}", "no tracker of Accelerate. Did you mean tensorboard"),
        ("training: {report_to: [none, wandb]}", "none does not go with other trackers"),
        ("training: {lr_scheduler_type: linaer, optim: adam}", "no schedule of transformers. Did you mean linear"),
        ("training: {lr_scheduler_type: greedy, optim: adam}", "needs arguments .* Allowed are linear, cosine, "),
        ("training: {lr_scheduler_type: linear}", "signum is schedule-free"),
        ("training: {max_grad_norm: 1.0}", "signum steps by the sign of the gradient"),
        ("training: {max_steps: 5, warmup_steps: 5}", "warmup_steps: 5 is not below the 5 steps"),
        ("heads: [{hookpoints: a, layers: [1]}]", "hookpoints and layers are two ways"),
        ("heads: [{source: a}]", r"heads\[0\].source: only a transcoder has one"),
        ("heads: [{skip_connection: true}]", r"heads\[0\].skip_connection: only a transcoder has one"),
        ("heads: [{type: transcoder, normalize_decoder: true}]", "starts at zero"),
        ("heads: [{k: 9, num_latents: 8}]", "k is 9, but the head has 8 latents"),
        ("heads: [{k: 3, num_latents: 8, activation: groupmax}]", "latents is not a multiple of k = 3"),
        ("heads: [{k: 3, num_latents: 8, multi_topk: true}]", "selects 4 . k = 12 latents"),
        ("heads: [{activation: groupmax, multi_topk: true}]", "it needs activation topk"),
        ("heads: [{name: a/b}]", "'a/b' cannot be the name of a head's folder"),
        ("heads: [{k_decay_steps: 9}]\ntraining: {max_steps: 8}", "k_decay_steps: 9 is more than the 8 steps"),
        ("training: {output_dir: ''}", "training.output_dir: it is empty"),
        ("training: {seed: 4294967296}", "training.seed: found 4294967296, the largest allowed is 4294967295"),
        ("data: {shuffle_seed: -1}", "data.shuffle_seed: found -1, the least allowed is 0"),
        ("heads: [{name: best}]", "'best' cannot be the name of a head's folder"),
        ("heads: [{k: 5}, {layers: [1]}, {k: 5}]", r"heads\[2\]: the same as heads\[0\] in every field"),
        ("heads:\n  - {k: 4, k: 5}", "line 2, column 12: key 'k' stands twice"),
        ("data: {load_args: {a: {b: 1, b: 2}}}", "line 1, column 30: key 'b' stands twice"),
        ("lora:", "lora: expected a mapping of keys to values, found null"),
        ("heads: [", "not YAML, line 1, column 9"),
        ("model: {}\n\t- a", "not YAML, line 2, column 1: .* cannot start any token"),
        ("model: {}\n  \x07", "not YAML, line 2, column 3: it holds the character"),
        ("model: {}\n---\ndata: {}", "line 2, column 1: expected a single document"),
        ("? [a, b]\n: 3", "line 1, column 3: .* unhashable key"),
        ("model: {revision: !!python/name:os.system }", "could not determine a constructor"),
        ("model: {revision: 2020-13-45}", "holds a value that cannot be read: month"),
        ("- a", "must be a mapping with the keys model, data, heads, lora, training"),
        ("", "is empty. Its sections are model, data, heads, lora, training"),
        ("# only a comment", "is empty"),
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
    with pytest.raises(InputError, match="is a folder. In .* there are: llama3.yaml"):
        load_recipe(tmp_path)
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        load_recipe(tmp_path / "llama3.yaml" / "x")
    with pytest.raises(InputError, match="cannot be read: .* null"):
        load_recipe("a\0b")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text in UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "There is no recipe.*--help"),
        (["-k", "3"], "'-k' stands before any option"),
        (["--trainng.optim", "adam"], "'trainng.optim': there is no such option. Did you mean training"),
        (["--k", "3"], "'k': there is no such option. It belongs under heads. Options are --section.field"),
        (["--training", "adam"], "'training': there is no such option"),
        (["--training.k", "3"], "training.k: there is no such key. It belongs under heads"),
        (["--"], "Options are --section.field"),
        (["--heads.k", "1", "r.yaml"], r"--heads.k: expected one value \(integer\), found 1 r.yaml"),
        (["--model.revision", "--x"], "found none. A value that begins with -- goes after ="),
        (["--heads.kk", "3"], "Did you mean k"),
        (["--heads.1.k", "3"], r"no heads\[1\]; it has 1"),
        (["--heads.k", "-3"], r"heads\[0\].k: found -3, the least allowed is 1"),
        (["--heads.k", "null"], r"heads\[0\].k: expected integer, found null"),
        (["--heads.k.j", "3"], "'heads.k.j': heads.k is integer, with no keys inside"),
        (["--training.learning_rate", "-1e-3"], "found -0.001, it must be above 0"),
        (["--data.streaming", "maybe"], "expected true or false, found 'maybe'"),
        (["--data.load_args", "{"], "is not a value"),
        (["--data.load_args", "{a: 1, a: 2}"], "is not a value"),
        (["--training.max_steps", "2020-13-45"], "is not a value"),
    ],
)
def test_wrong_command_lines_are_refused(words, message):
    with pytest.raises(InputError, match=message) as error:
        parse_command_line(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["model:", "model: 3", "heads: {k: 3}", "heads: [3]", "data: {load_args: 3}"])
def test_values_for_a_section_that_is_none_leave_its_error_as_it_is(tmp_path, text):
    path = _write(tmp_path / "r.yaml", text)
    with pytest.raises(InputError, match="expected a?.*(mapping|list of entries)"):
        parse_command_line([path, "--model.revision", "x", "--heads.k", "3", "--data.load_args.a", "1"])


def test_arguments_of_load_dataset_can_be_given_one_by_one():
    recipe = parse_command_line(["--data.load_args", "{a: 1}", "--data.load_args.data_files", "x.txt"])
    assert recipe.data.load_args == {"a": 1, "data_files": "x.txt"}


@pytest.mark.parametrize(
    ("hint", "name"),
    [
        (int, "integer"),
        (float | None, "number or null"),
        (bool | None, "true, false or null"),
        (bool | str, "true, false or string"),
        (Literal["sae", "transcoder"], "one of sae, transcoder"),
        (list[str], "list of strings"),
        (dict[str, int], "mapping"),
    ],
)
def test_types_are_named_in_words(hint, name):
    assert type_name(hint) == name


def test_help_is_printed_and_ends_the_program(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    for words in (["-h"], ["recipes/x.yaml", "--help"]):
        assert main(words) == 0 and capsys.readouterr().out == help_text(90) + "\n"


@pytest.mark.parametrize("width", [76, 80, 120])
def test_help_names_every_field_with_type_default_and_meaning_within_the_width(width):
    text = help_text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    unwrapped = " ".join(text.split())
    for section, arguments in SECTIONS.items():
        for option in fields(arguments):
            head = f"--{section}.{option.name} {type_name(field_hints(arguments)[option.name])}"
            default = yaml.safe_dump(default_of(option), default_flow_style=True).split("\n")[0]
            meaning = " ".join(option.metadata["help"].split())
            assert re.search(rf"{re.escape(head)}[^;]*; default {re.escape(default)} {re.escape(meaning)}", unwrapped)


def test_the_examples_of_the_help_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    _write(tmp_path / "recipes" / "llama3.yaml", "{}")
    examples = USAGE.split("Examples:")[1].replace("\\\n", " ").strip().split("\n\n")
    commands = [shlex.split(example.strip()) for example in examples]
    assert [command[:4] for command in commands] == [["accelerate", "launch", "-m", "sae_accel.train"]] * 3
    recipes = [parse_command_line(command[4:]) for command in commands]
    assert [recipe.heads[0].k for recipe in recipes] == [32, 64, 32]
    assert recipes[2].heads[0].hookpoints == ["h.*.attn", "h.*.mlp.act"]


def test_a_token_is_not_shown_where_a_recipe_is_printed():
    recipe = parse_command_line(["--model.token", "hf_secret"])
    assert recipe.model.token == "hf_secret" and "hf_secret" not in repr(recipe)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 5000, "nested too deeply"),
        ("model: &a\n  name_or_path: *a\n", "holds itself"),
        ("model: {max_memory: &a {cpu: *a}}\n", "holds itself"),
        ('training: {output_dir: "a\\0b"}\n', r"training.output_dir: it holds the character '\\x00'"),
        ('data: {load_args: {revision: "\\ud800"}}\n', "data.load_args.revision: it holds the character"),
        ('data: {path: ""}\n', "data.path: it is empty"),
        ("training: {save_steps: 999999999999999999999}\n", "training.save_steps: found an integer of 21 characters"),
        ("data: {exclude_tokens: [-99999999999999999999]}\n", "data.exclude_tokens"),
        ("heads: [{name: 'a[1]'}]\n", "cannot be the name of a head's folder"),
    ],
)
def test_what_no_file_and_no_machine_can_hold_is_refused(tmp_path, text, says):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=says):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("words", [["--dry-run", "²"], ["--dry-run", "9" * 30], ["--dry-run", "0"]])
def test_what_is_no_number_of_processes_is_refused(words):
    with pytest.raises(InputError, match="expected a number of processes"):
        split_dry_run(words)


def test_an_entry_of_heads_with_too_large_a_number_is_refused():
    with pytest.raises(InputError, match="there is no such key"):
        parse_command_line([f"--heads.{'9' * 5000}.k", "3"])

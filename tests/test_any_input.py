"""
Any input gives a result or one line of error, never a traceback.

This tests random input for an hour:

    python -m pytest tests/test_any_input.py --hypothesis-profile=long -o timeout=0
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import command_words, tiny_trainer
from transformers import AutoTokenizer

from sae_accel import AutoSae, train
from sae_accel.common.errors import InputError
from sae_accel.data.tokens import load_tokens
from sae_accel.loading.convert import convert
from sae_accel.models import HeadModel
from sae_accel.recipe.arguments import SECTIONS, DataArguments
from sae_accel.recipe.command_line import parse_command_line


def several(count: int) -> settings:
    """Sets the number of examples, which in a long run is a hundred times larger."""
    is_long = settings.get_current_profile_name() == "long"
    return settings(max_examples=count * 100 if is_long else count)


def outcome(call: Callable[[], object]) -> object:
    """Returns the result of `call`, or None after an `InputError` of one line."""
    try:
        return call()
    except InputError as error:
        assert str(error) and "\n" not in str(error), error
        return None


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12)
NUMBERS = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(width=32), st.sampled_from([2**31, 2**63, 10**400, -0.0, 1e-320])
)
SIMPLE = st.one_of(
    st.none(), st.booleans(), NUMBERS, WORDS, st.sampled_from(["", "true", "1e3", "auto", "~", "layers.*"])
)
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
NAMES = {section: [field.name for field in fields(kind)] for section, kind in SECTIONS.items()}


def _section(name: str) -> st.SearchStrategy:
    known = st.dictionaries(st.sampled_from(NAMES[name]), VALUES, max_size=4)
    entries = st.one_of(known, st.lists(known, max_size=3)) if name == "heads" else known
    return st.one_of(entries, entries, entries, VALUES)


# Characters with a meaning in YAML.
SIGNS = "{}[]:-,&*!|>'\"%@` \n\tab1.?#~"
RECIPES = st.fixed_dictionaries({}, optional={name: _section(name) for name in SECTIONS})


@several(150)
@given(content=RECIPES)
def test_any_recipe_is_one_or_is_refused(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    outcome(lambda: parse_command_line([str(file)]))


@several(100)
@given(
    content=st.one_of(st.binary(max_size=80), st.text("{}[]:-,&*!|>'\"%@` \n\tab1.?#~", max_size=60).map(str.encode))
)
def test_any_file_is_a_recipe_or_is_refused(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    outcome(lambda: parse_command_line([str(file)]))


FLAGS = st.builds("--{}.{}".format, st.sampled_from(list(SECTIONS)), st.sampled_from(sum(NAMES.values(), [])))
TYPED = st.one_of(WORDS, NUMBERS.map(str), st.sampled_from(["[", "{a: b", "null", "[1, 2]", "--", "-1", "{}"]))


@several(150)
@given(words=st.lists(st.one_of(FLAGS, TYPED, st.tuples(FLAGS, TYPED)), max_size=6))
def test_any_command_line_is_a_run_or_is_refused(words):
    flat = [word for item in words for word in (item if isinstance(item, tuple) else (item,))]
    try:
        outcome(lambda: parse_command_line([word for word in flat if word not in ("-h", "--help")]))
    except SystemExit as end:
        # argparse refuses in its own way.
        assert end.code == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with two heads and a checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny_trainer(folder, max_steps=2, save_steps=1, seed=1).train()
    return folder


@pytest.fixture(scope="module")
def layouts(run, tmp_path_factory):
    """A folder with the same head in several layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    for to in ("sae_accel", "sparsify", "saelens"):
        convert(str(run), folder / to, to, ["layers.1"])
    head = AutoSae.from_pretrained(run, hookpoint="layers.1")
    (folder / "torch").mkdir()
    weights = {
        "encoder.weight": head.encoder.weight,
        "encoder.bias": head.encoder.bias,
        "decoder.weight": head.W_dec.T,
    }
    more = {"b_dec": head.b_dec, "k": torch.tensor(4)}
    torch.save(
        {name: tensor.detach().clone() for name, tensor in (weights | more).items()}, folder / "torch" / "ae.pt"
    )
    trainer = {
        "dict_class": "AutoEncoderTopK",
        "activation_dim": 24,
        "dict_size": 96,
        "k": 4,
        "layer": 1,
        "lm_name": "lm",
    }
    (folder / "torch" / "config.json").write_text(json.dumps({"trainer": trainer}))
    assert all(len(AutoSae.open(folder / name)) == 1 for name in ("sae_accel", "sparsify", "saelens", "torch"))
    return folder


def _change_bytes(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, min(len(content), data.draw(st.sampled_from([64, 2000, 10**9]))) - 1)))
        kind = data.draw(st.sampled_from(["flip", "cut", "add"]))
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + data.draw(st.sampled_from([1, 7, 10**9]))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(content)


def _change_json(path: Path, data: st.DataObject) -> None:
    """Replaces one value at any depth, or deletes a key."""
    content = json.loads(path.read_text())
    inside = content
    while isinstance(inside, dict) and inside:
        key = data.draw(st.sampled_from(sorted(inside)))
        if isinstance(inside[key], dict) and data.draw(st.booleans()):
            inside = inside[key]
            continue
        if data.draw(st.integers(0, 3)):
            inside[key] = data.draw(VALUES)
        else:
            del inside[key]
        break
    path.write_text(json.dumps(content))


def _change_tensors(path: Path, data: st.DataObject) -> None:
    is_torch = path.suffix == ".pt"
    tensors = torch.load(path, weights_only=True) if is_torch else load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    changes = {
        "gone": lambda: tensors.pop(name),
        "renamed": lambda: tensors.update({data.draw(WORDS): tensors.pop(name)}),
        "typed": lambda: tensors.update({name: tensor.to(data.draw(st.sampled_from(DTYPES)))}),
        "cut": lambda: (
            tensors.update({name: tensor[..., : data.draw(st.integers(0, 3))].contiguous()}) if tensor.ndim else None
        ),
        "turned": lambda: tensors.update({name: tensor.t().contiguous()}),
        "deeper": lambda: tensors.update({name: tensor[None]}),
        "more": lambda: tensors.update({data.draw(WORDS): torch.zeros(data.draw(st.integers(0, 3)))}),
        "not finite": lambda: (
            tensors.update({name: torch.full_like(tensor, math.nan)}) if tensor.is_floating_point() else None
        ),
    }
    changes[data.draw(st.sampled_from(sorted(changes)))]()
    if is_torch:
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def _used(head: HeadModel) -> None:
    """Encodes with a head, and decodes if the head has a decoder."""
    output = head(torch.ones(2, head.config.d_in, dtype=head.dtype)) if head.W_dec is not None else None
    assert output is None or output.reconstruction.shape == (2, head.config.d_out)


DTYPES = [torch.int8, torch.int64, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.complex64]


@several(120)
@given(data=st.data())
def test_any_files_are_a_head_or_are_refused(layouts, tmp_path_factory, data):
    layout = data.draw(st.sampled_from(["sae_accel", "sparsify", "saelens", "torch"]))
    folder = tmp_path_factory.getbasetemp() / "any-head"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(layouts / layout, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    kinds = [_change_bytes, _change_json if path.suffix == ".json" else _change_tensors]
    data.draw(st.sampled_from(kinds))(path, data)
    with warnings.catch_warnings():
        # Warnings about numbers that are too large for their type.
        warnings.simplefilter("ignore")
        outcome(lambda: [_used(head) for head in AutoSae.open(folder).values()])


@several(12)
@given(data=st.data())
def test_a_run_goes_on_from_any_checkpoint_or_it_is_refused(run, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "any-run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    files = sorted(path for path in (folder / "checkpoint-2").rglob("*") if path.is_file())
    _change_bytes(data.draw(st.sampled_from(files)), data)
    trainer = tiny_trainer(folder, max_steps=3, save_steps=1, seed=1)
    outcome(lambda: trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2")))


IDS = st.lists(st.one_of(st.integers(-2, 120), st.none(), st.booleans(), st.floats(width=32)), max_size=20)
TEXTS = st.one_of(
    WORDS, st.text("w0123456789 ", max_size=80), st.just("\ud800"), st.none(), st.integers(), st.lists(WORDS)
)
ROWS = st.one_of(
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries(
        {"input_ids": st.one_of(IDS, st.none(), WORDS), "attention_mask": st.one_of(IDS, st.none())}
    ),
    st.dictionaries(st.sampled_from(["text", "input_ids", "attention_mask", "more"]), VALUES, max_size=3),
)


@several(25)
@given(rows=st.lists(ROWS, max_size=5), streaming=st.booleans(), bad_rows=st.sampled_from(["skip", "stop"]))
def test_any_rows_are_data_or_are_refused(place, tmp_path_factory, rows, streaming, bad_rows):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    good = [json.loads(line) for line in (place / "text.jsonl").read_text().splitlines()]
    file.write_text("\n".join(json.dumps(row) for row in [*good[:5], *rows, *good[5:9]]))
    tokenizer = AutoTokenizer.from_pretrained(place / "lm")
    cache = {"cache_dir": str(tmp_path_factory.getbasetemp() / "any-cache")}
    asked = dict(path=str(file), ctx_len=16, eval_examples=1, streaming=streaming, bad_rows=bad_rows, load_args=cache)

    def read() -> None:
        for rows in load_tokens(DataArguments(**asked), tokenizer, vocab_size=101):
            for row in rows:
                ids = torch.as_tensor(row["input_ids"])
                assert not ids.is_floating_point() and len(ids) <= 16 and 0 <= ids.min() and ids.max() < 101

    outcome(read)


@pytest.fixture(scope="module")
def hub(run, tmp_path_factory):
    """A Hub on loopback with the run's heads as `user/saes`."""
    root = tmp_path_factory.mktemp("hub")
    (root / "user").mkdir()
    shutil.copytree(run, root / "user" / "saes", ignore=shutil.ignore_patterns("checkpoint*", ".*"))
    with HubServer(root) as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in hub.settings(root / "cache").items():
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        patch.setattr("sae_accel.common.hub_requests._growing", lambda tries: 0.0)
        patch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
        patch.setattr("huggingface_hub.utils._headers.detect_agent", lambda: None)
        yield hub


ANSWERS = st.one_of(
    VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40), st.just(b"<html></html>")
)


@several(60)
@given(data=st.data())
def test_any_answer_of_a_hub_is_used_or_is_refused(hub, tmp_path_factory, data):
    cache = tmp_path_factory.getbasetemp() / "any-hub-cache"
    shutil.rmtree(cache, ignore_errors=True)
    true = hub.repo("user/saes").at("main")
    info = {"id": "user/saes", "sha": true.sha, "private": False, "siblings": []}
    tree = true.entries(sorted(true.files), False)
    path, answer = data.draw(st.sampled_from([("/api/models/user/saes", info), ("/tree/", tree), ("/resolve/", None)]))
    if answer is None or data.draw(st.booleans()):
        body = data.draw(ANSWERS)
    else:
        inside = data.draw(st.sampled_from(answer)) if isinstance(answer, list) else answer
        inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(VALUES)
        body = json.dumps(answer).encode()
    hub.lie(path, body, times=3)
    if data.draw(st.booleans()):
        hub.fail(None, path, data.draw(st.sampled_from([200, 204, 301, 304, 307, 400, 404, 416, 429, 500])))
    try:
        outcome(lambda: AutoSae.open("user/saes", cache_dir=cache).load("layers.1"))
    finally:
        hub.mend()


@several(8)
@given(data=st.data())
def test_any_lm_trains_or_is_refused(place, tmp_path_factory, capsys, data):
    folder = tmp_path_factory.getbasetemp() / "any-place"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place, folder)
    path = data.draw(st.sampled_from(sorted((folder / "lm").iterdir())))
    change = _change_json if path.suffix == ".json" and data.draw(st.booleans()) else _change_bytes
    change(path, data)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = train.main(command_words(folder, folder, **{"training.max_steps": 1}))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sae_accel: ")]
    assert status == 0 or (status == 2 and len(said) == 1)

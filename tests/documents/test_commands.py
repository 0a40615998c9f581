"""Every command line that the project shows is one that its programs read."""

import argparse
import configparser
import re
import subprocess
from dataclasses import fields

import pytest
from accelerate.commands.launch import launch_command_parser
from sparsify import SparseCoderConfig
from sparsify.__main__ import RunConfig
from torch.distributed.run import get_args_parser
from written import ROOT, blocks, command_lines, notebooks, pages, prose, recipes, words_of

from sae_accel import convert, push
from sae_accel.__main__ import COMMANDS
from sae_accel.common.reports import DEBUG
from sae_accel.recipe.command_line import help_text, parse_command_line, split_dry_run
from sae_accel.recipe.packaged import with_packaged


FILES = {str(path.relative_to(ROOT)): path for path in [*pages(), *recipes(), *notebooks()]}
LINES = {name: list(command_lines(path)) for name, path in FILES.items()}
# Words of `train` that read no recipe.
LISTS = {"--help", "--list-recipes", "--schema"}
MAKEFILE = (ROOT / "Makefile").read_text()


def _train(words: list[str]) -> None:
    words = [word for word in words if word != DEBUG]
    if words and words[0] in LISTS:
        assert len(words) == 1
    elif words and words[0] == "--copy-recipe":
        assert len(words) == 2 and (ROOT / "recipes" / words[1]).with_suffix(".yaml").is_file(), words
    else:
        words, _ = split_dry_run(words)
        words, _ = with_packaged(words)
        parse_command_line(words)


def _module(module: str, words: list[str]) -> None:
    package, _, name = module.partition(".")
    assert package == "sae_accel", module
    _command([name, *words] if name else words)


def _command(words: list[str]) -> None:
    """The words after `sae-accel`."""
    if words[0] in ("--help", "-h"):
        return
    assert words[0] in COMMANDS, words[0]
    if words[0] == "train":
        _train(words[1:])
    elif words[1:] != ["--help"]:
        parser = {"push": push, "convert": convert}[words[0]]._parser()
        parser.parse_args(words[1:])


def _launched(parser: argparse.ArgumentParser, words: list[str]) -> None:
    found = parser.parse_args(words)
    config = getattr(found, "config_file", None)
    assert config is None or (ROOT / config).is_file(), config
    assert found.module, "a launcher starts the package as a module: -m sae_accel.train"
    _module(found.training_script, found.training_script_args)


def _python(words: list[str]) -> None:
    if words[0] == "-m" and words[1] not in ("pytest", "venv", "pip"):
        _module(words[1], words[2:])
    elif words[0] == "-m" and words[1] == "pip":
        _pip(words[2:])
    elif words[0] == "-m":
        paths = [word for word in words[2:] if word.startswith("tests")]
        assert all((ROOT / path.split("::")[0]).exists() for path in paths), words
    else:
        source = (ROOT / words[0]).read_text()
        assert all(word in source for word in words[1:] if word.startswith("--")), words


def _pip(words: list[str]) -> None:
    assert words[0] == "install", words
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    for word in words[1:]:
        extras = re.fullmatch(r"(?:sae_accel|\.)(?:\[([\w,]+)\])?", word)
        names = ((extras and extras[1]) or "").split(",")
        assert set(names) - {""} <= set(settings["options.extras_require"]), word


def _make(words: list[str]) -> None:
    for word in words:
        assert "=" in word or re.search(rf"^{word}:", MAKEFILE, re.MULTILINE), word


def _file(words: list[str]) -> None:
    assert (ROOT / words[-1]).is_file(), words[-1]


READERS = {
    "accelerate": lambda words: _launched(launch_command_parser(), words[1:]) if words[0] == "launch" else None,
    "torchrun": lambda words: _launched(get_args_parser(), words),
    "python": _python,
    "sae-accel": _command,
    "make": _make,
    "pip": _pip,
    "sbatch": _file,
    # Programs of others, which are shown as their own documentation shows them.
    **dict.fromkeys(("export", "cd", "git", "hf", "tensorboard", "jupyter", "du", "nvidia-smi"), lambda words: None),
}


@pytest.mark.parametrize("name", [name for name, lines in LINES.items() if lines])
def test_the_commands_of_a_file_are_read(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in LINES[name]:
        for command in re.split(r"\s(?:&&|\|)\s", line):
            words = words_of(command)
            if words:
                assert words[0] in READERS, f"{name}: no program {words[0]!r} is known to this test: {line}"
                READERS[words[0]](words[1:])


def test_there_are_commands_in_each_place():
    count = {
        kind: sum(len(LINES[name]) for name in FILES if name.startswith(kind))
        for kind in ("README", "docs", "recipes")
    }
    assert count["README"] >= 5 and count["docs"] >= 20 and count["recipes"] >= 9, count


@pytest.mark.parametrize(
    "line",
    [
        "accelerate launch --config_file recipes/accelerate/none.yaml -m sae_accel.train recipes/llama3.yaml",
        "accelerate launch -m sae_accel.train recipes/llama3.yaml --heads.kk 3",
        "torchrun --nproc_per_nod 2 -m sae_accel.train recipes/llama3.yaml --bogus 1",
        "python -m sae_accel.train recipes/llama3.yaml --dry_run",
        "python -m sae_accel.push runs/quickstart",
        "python -m sae_accel.convert a b --to nobody",
        "make quickstarts",
        "pip install sae_accel[plot]",
    ],
)
def test_a_command_that_is_wrong_is_found_out(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = words_of(line)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        READERS[words[0]](words[1:])


def _options_that_exist() -> set[str]:
    parsers = [push._parser(), convert._parser(), launch_command_parser(), get_args_parser()]
    typed = [option for parser in parsers for option in parser._option_string_actions]
    sources = [path.read_text() for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py")]
    of_sparsify = [f"--{field.name}" for config in (RunConfig, SparseCoderConfig) for field in fields(config)]
    return {*typed, *of_sparsify, *LISTS, *OTHERS, *OPTION.findall("\n".join([help_text(100), *sources]))}


OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w.-]*\w")
# Options of pytest, the debugger's of this package, and the two of `train` that a recipe's help does not list.
OTHERS = {"--hypothesis-profile", DEBUG, "--copy-recipe", "--dry-run"}


@pytest.mark.parametrize("name", FILES)
def test_an_option_that_is_named_in_a_sentence_exists(name):
    text = prose(FILES[name])
    for block in blocks(text):
        text = text.replace(block.text, "")
    sentences = [
        line for line in text.splitlines() if line.split(" ")[0] != "SBATCH" and line.strip() not in LINES[name]
    ]
    known = _options_that_exist()
    for option in OPTION.findall("\n".join(sentences)):
        field = re.sub(r"^--heads\.\d+\.", "--heads.", re.sub(r"^(--data\.load_args)\..*", r"\1", option))
        assert field in known, f"{name} names {option}, which no program takes"


def test_a_shell_reads_the_scripts():
    for script in (ROOT / "recipes").rglob("*.slurm"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0

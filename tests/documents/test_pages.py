"""Code and recipes in README and documentation do what they are there for, in a small world."""

from pathlib import Path

import pytest
import yaml
from small_world import smaller
from written import ROOT, blocks, pages

from sae_accel.recipe.recipe import Recipe


PAGES = {str(path.relative_to(ROOT)): path for path in pages()}
PART = "# part of a recipe"
# A part of a recipe is read as a change to this one.
WHOLE = {
    "model": {"name_or_path": "gpt2"},
    "data": {"path": "some/data"},
    "heads": [{"hookpoints": "layers.1"}],
    "training": {"output_dir": "runs/part"},
}


def _blocks(language: str) -> dict[str, list]:
    found = {name: list(blocks(path.read_text(encoding="utf-8"))) for name, path in PAGES.items()}
    kept = {name: [block for block in page if block.language == language] for name, page in found.items()}
    return {name: page for name, page in kept.items() if page}


PYTHON, YAML = _blocks("python"), _blocks("yaml")
# Tests of its own run the code of the front page, and look at what it does.
del PYTHON["README.md"]


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, small_world, capsys):
    names: dict = {}
    for block in PYTHON[page]:
        if "no-run" not in block.marks:
            code = compile("\n" * block.line + smaller(block.text), page, "exec")
            exec(code, names)


@pytest.mark.parametrize("page", YAML)
def test_the_recipes_of_a_page_are_read(page):
    for block in YAML[page]:
        found = yaml.safe_load(block.text)
        if block.text.startswith(PART):
            found = {name: _merged(WHOLE.get(name), found.get(name)) for name in WHOLE | found}
        assert Recipe.from_dict(found, f"{page}:{block.line}").heads


def _merged(whole, part):
    return {**whole, **part} if isinstance(whole, dict) and isinstance(part, dict) else part or whole


def test_fences_say_what_they_hold():
    known = {"python", "bash", "yaml", "text"}
    unknown = [
        f"{name}:{block.line} ```{block.language}"
        for name, path in PAGES.items()
        for block in blocks(Path(path).read_text(encoding="utf-8"))
        if block.language not in known
    ]
    assert not unknown
    assert PYTHON and YAML

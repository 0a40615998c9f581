"""Checks the rooms of the package: which exist, and which may import which."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sae_accel"
# From the top down: a room may import from itself and from the rooms below it in this list.
ROOMS = [
    "planning",
    "training",
    "spread",
    "bank",
    "activations",
    "runs",
    "hub",
    "cards",
    "lm",
    "loading",
    "formats",
    "data",
    "processes",
    "models",
    "recipe",
    "ops",
    "common",
]
# `push_to_hub` is a method of heads, as in transformers, so heads import releases, which read heads.
ONE_EXCEPTION = {("models/releasing.py", "hub")}


def _imported_rooms(path: Path) -> Iterator[str]:
    """Yields the rooms from which a file imports, at its top or inside a function."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [tuple(node.module.split("."))]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1)


def test_every_folder_is_a_room():
    assert sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_rooms_below_it_alone(room):
    allowed = ROOMS[ROOMS.index(room) :]
    for path in (PACKAGE / room).rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        wrong = {(name, other) for other in _imported_rooms(path) if other not in allowed}
        assert wrong <= ONE_EXCEPTION


# Other libraries are imported once. Then each fork imports one room as the first of the package.
EACH_FIRST = f"""
import os, sys
import accelerate, datasets, transformers.modeling_utils
for room in {ROOMS}:
    child = os.fork()
    if not child:
        assert not [name for name in sys.modules if name.startswith("{PACKAGE.name}")]
        __import__("{PACKAGE.name}." + room)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(room)
"""


def test_each_room_can_be_imported_first():
    done = subprocess.run([sys.executable, "-c", EACH_FIRST], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_models_know_neither_accelerate_nor_an_lm():
    for path in [*PACKAGE.glob("models/*.py"), *PACKAGE.glob("ops/*.py")]:
        assert "accelerate" not in path.read_text()


def test_files_and_functions_stay_short_enough_to_read():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                code = node.body[ast.get_docstring(node) is not None :]
                assert not code or node.end_lineno - code[0].lineno < 60, f"{path}: {node.name}"


def test_importing_the_package_prints_nothing_and_offers_what_it_says():
    code = "import sae_accel; [getattr(sae_accel, name) for name in sae_accel.__all__]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_page_of_the_architecture_has_each_room_in_order():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == ROOMS
    listed = re.search(r"```text\n(.*?)```", page, re.DOTALL)
    assert listed[1].split() == ROOMS
    for path in re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py)`", page):
        assert (PACKAGE / path).is_file(), path

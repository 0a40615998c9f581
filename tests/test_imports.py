"""A public name, a head or a command imports no more than it needs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sae_accel
from sae_accel.__main__ import COMMANDS
from sae_accel.convert import LAYOUTS
from sae_accel.loading.convert import WRITERS


ROOT = Path(__file__).parent.parent
# The rooms whose code loads one head from a folder or repo.
ROOMS_OF_A_HEAD = {"common", "ops", "recipe", "models", "formats", "loading"}
HEAVY = {"peft", "bitsandbytes", "datasets", "matplotlib", "tensorboard", "deepspeed", "transformers.trainer_callback"}


def _modules_after(code: str) -> set[str]:
    """Names of all modules in a fresh interpreter after it has run some code."""
    code = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_else():
    found = _modules_after("import sae_accel; assert sae_accel.__version__")
    assert {name for name in found if name.startswith("sae_accel")} == {"sae_accel"}
    assert not {"torch", "transformers", "numpy"} & found


def test_loading_one_head_imports_what_heads_are_made_of_and_no_more():
    found = _modules_after("from sae_accel import AutoSae")
    rooms = {name.split(".")[1] for name in found if name.startswith("sae_accel.")}
    assert rooms == ROOMS_OF_A_HEAD
    assert not HEAVY & found


def test_every_public_name_is_offered_from_where_type_checkers_see_it():
    tree = ast.parse((ROOT / "sae_accel" / "__init__.py").read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert seen == sae_accel._HOMES and set(sae_accel.__all__) == set(seen) <= set(dir(sae_accel))
    for name in sae_accel.__all__:
        assert getattr(sae_accel, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'AutoSea'"):
        sae_accel.AutoSea  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_without_waiting_for_torch(command):
    code = f"""
from sae_accel.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
"""
    assert not {"torch", "transformers", "accelerate", "numpy"} & _modules_after(code)


def test_the_commands_are_listed_and_run_by_name():
    assert sorted(COMMANDS) == sorted(
        path.stem for path in (ROOT / "sae_accel").glob("*.py") if not path.stem.startswith("__")
    )
    for words in ([], ["--help"]):
        done = subprocess.run([sys.executable, "-m", "sae_accel", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    done = subprocess.run([sys.executable, "-m", "sae_accel", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no command 'trian'" in done.stderr
    program = Path(sys.executable).with_name("sae-accel")
    done = subprocess.run([program, "train", "nothing.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "sae_accel: There is no recipe 'nothing.yaml', neither here"
    )


def test_the_layouts_that_the_command_offers_are_those_that_are_written():
    assert set(LAYOUTS) == set(WRITERS)

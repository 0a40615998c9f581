"""The wheel, the sdist and the files beside the code: what setuptools is told, held to what is there."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import yaml

import sae_accel
from sae_accel.recipe.packaged import packaged_names


ROOT = Path(__file__).parent.parent
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
MAKEFILE = (ROOT / "Makefile").read_text()


def _bounds(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)[>=]=([\d.]+)$", text, re.MULTILINE))


def test_a_build_holds_the_recipes_the_configs_and_the_card_inside_the_package(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "build_py", "-d", tmp_path]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        built = tmp_path / "sae_accel"
        for name in [*packaged_names(), "schema.json"]:
            assert (built / "recipes" / name).read_bytes() == (ROOT / "recipes" / name).read_bytes()
        assert (built / "cards" / "model_card.md").is_file() and (built / "py.typed").is_file()
        # A recipe of an earlier build is gone after the next.
        assert not (built / "recipes" / "old.yaml").exists()
        (built / "recipes" / "old.yaml").touch()


def test_the_sdist_is_told_of_every_folder_and_file_that_its_tests_read():
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    for name in (
        "benchmarks",
        "docs",
        "examples",
        "recipes",
        "tests",
        ".ci",
        ".github",
        "Makefile",
        "README.md",
        "CHANGELOG.md",
    ):
        assert name in manifest
    for name in ("constraints.txt", "constraints-oldest.txt", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"):
        assert name in manifest and (ROOT / name).is_file()


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sae_accel.__version__ and citation["cff-version"] == "1.2.0"
    assert citation["license"] == SETUP["metadata"]["license_expression"]
    assert citation["repository-code"] == SETUP["metadata"]["url"]


def test_the_oldest_versions_that_are_tested_are_the_bounds():
    extras = SETUP["options.extras_require"]
    stated = _bounds(SETUP["options"]["install_requires"])
    for extra in ("lora", "plots", "quantized", "tensorboard", "quickstart"):
        stated |= _bounds(extras[extra])
    assert _bounds((ROOT / "constraints-oldest.txt").read_text()) == stated


def test_the_newest_versions_that_are_tested_are_not_below_the_bounds():
    def parts(version):
        return [int(part) for part in version.split(".")]

    newest = _bounds((ROOT / "constraints.txt").read_text())
    for name, bound in _bounds(SETUP["options"]["install_requires"]).items():
        assert name not in newest or parts(bound) <= parts(newest[name]), name


def test_each_target_has_a_line_in_make_help():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    named = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    assert sorted(phony.split()) == sorted(named)
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert re.findall(r"^  make ([a-z-]+) +\S", done.stdout, re.MULTILINE) == named


def test_the_workflow_runs_targets_and_the_templates_are_forms():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["check"]["steps"] if "run" in step]
    assert commands == ["make quality test docs"]
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in commands[0].split()[1:])
    for name in ("bug", "feature"):
        form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
        assert {"name", "description", "body"} <= form.keys()
        assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text())["contact_links"]


def test_the_code_is_written_in_the_oldest_python():
    for path in (ROOT / "sae_accel").rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))

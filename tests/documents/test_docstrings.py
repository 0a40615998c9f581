"""Each public function shows an example, and each example runs."""

import inspect
import re

import pytest
from small_world import names_for_an_example, smaller
from written import ROOT, blocks

import sae_accel


API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def _public() -> dict[str, object]:
    """The names on the page of the Python API, and the methods that it shows of each."""
    found: dict[str, object] = {}
    for name, options in re.findall(r"^::: sae_accel\.(\w+)\n((?:    .*\n)*)", API, re.MULTILINE):
        member = getattr(sae_accel, name)
        found[name] = member
        shown = re.search(r"members: \[(.*)\]", options)
        for inner in shown[1].split(", ") if shown and shown[1] else () if shown else _methods(member):
            found[f"{name}.{inner}"] = getattr(member, inner)
    return found


def _methods(owner: object) -> list[str]:
    """Names of the methods that a class defines itself."""
    own = vars(owner) if inspect.isclass(owner) else {}
    return [name for name in own if not name.startswith("_") and callable(getattr(owner, name))]


PUBLIC = _public()
DOCS = {name: inspect.getdoc(member) or "" for name, member in PUBLIC.items()}
# A method that two classes share is shown once.
EXAMPLES = {
    text: f"{name}:{i}"
    for name, doc in reversed(DOCS.items())
    for i, block in enumerate(blocks(doc))
    if block.language == "python" and "no-run" not in block.marks
    for text in [block.text]
}


@pytest.fixture(scope="module")
def names(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        return names_for_an_example()


@pytest.mark.parametrize("code", EXAMPLES, ids=EXAMPLES.values())
def test_an_example_runs(code, names, small_world, capsys):
    exec(compile(smaller(code), EXAMPLES[code], "exec"), dict(names))


def test_each_public_function_has_an_example():
    functions = [name for name, member in PUBLIC.items() if callable(member)]
    without = [name for name in functions if not any(block.language == "python" for block in blocks(DOCS[name]))]
    assert not without
    assert len(EXAMPLES) > 30


def test_the_page_of_the_api_has_every_public_name():
    assert {name for name in PUBLIC if "." not in name} == set(sae_accel.__all__)

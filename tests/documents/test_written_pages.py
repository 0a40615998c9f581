"""Two pages are written from what they tell of: the help of the commands, and the results of benchmarks."""

import subprocess
import sys

import pytest
from written import ROOT


@pytest.mark.parametrize("script, page", [("command_line", "command-line.md"), ("performance", "performance.md")])
def test_a_page_is_as_its_script_writes_it(script, page):
    code = f"import sys; sys.path.insert(0, 'docs'); import {script}; print({script}.page(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == done.stdout, f"write it anew: python docs/{script}.py"


def test_each_result_is_on_the_page_of_performance():
    results = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert results and all(name in page for name in results)

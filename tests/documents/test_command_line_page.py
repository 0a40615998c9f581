"""The page of the command line is the text that `--help` prints."""

import subprocess
import sys

from written import ROOT


def test_the_page_is_what_the_help_says():
    script = "import sys; sys.path.insert(0, 'docs'); import command_line; print(command_line.page(), end='')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert written == done.stdout, "write it anew: python docs/command_line.py"

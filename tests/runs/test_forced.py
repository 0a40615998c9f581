"""Kills and failures by force. `make soak` tries more of them than there is time for here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _forced(folder, *words) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, Path(__file__).with_name("forced.py"), folder, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("mode", "count"), [("kills", 4), ("faults", 130)])
def test_a_run_that_is_killed_or_whose_disk_fails_ends_as_one_that_was_never_stopped(tmp_path, mode, count):
    found = _forced(tmp_path, mode, count)
    assert found["tried"] >= 4 and not found["lost"], "\n".join(found["lost"])

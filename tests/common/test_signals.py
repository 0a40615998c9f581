"""Signals to commands that have not come to their work yet."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sae_accel.common.signals import ORPHAN_SECONDS, Signals


ROOT = Path(__file__).parents[2]
# What a command imports in torch's stead: the signal comes in the midst of it.
IMPORT = """
import os, time
os.kill(os.getpid(), {})
try:
    time.sleep(60)
except BaseException:
    pass
"""
NOTHING = "Nothing was saved yet: start again with the same command."


@pytest.mark.parametrize(
    ("words", "number", "says"),
    [
        (["-m", "sae_accel.train"], signal.SIGINT, NOTHING),
        (["-m", "sae_accel", "train"], signal.SIGTERM, NOTHING),
        (["-m", "sae_accel.push", "run", "name"], signal.SIGHUP, "Push again to go on"),
        (["-m", "sae_accel.convert", "a", "b", "--to", "sparsify"], signal.SIGTERM, "Nothing was written"),
    ],
)
def test_a_signal_in_the_midst_of_an_import_ends_a_command_with_one_line(tmp_path, words, number, says):
    (tmp_path / "torch.py").write_text(IMPORT.format(int(number)))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 128 + number
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sae_accel: Stopped by {number.name}. {says}")


def test_what_nohup_has_ignored_stays_ignored(tmp_path):
    (tmp_path / "torch.py").write_text(IMPORT.format(int(signal.SIGHUP)).replace("60", "0.5") + "os._exit(7)")
    done = subprocess.run(
        ["nohup", sys.executable, "-m", "sae_accel.train"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=50,
    )
    assert done.returncode == 7


@pytest.mark.parametrize("signalled", [False, True])
def test_a_process_whose_launcher_has_died_has_a_bounded_time_to_save(monkeypatch, signalled):
    now, left = [100.0], []
    monkeypatch.setattr("sae_accel.common.signals.time.monotonic", lambda: now[0])
    found = Signals()
    found.is_deferred, found.leave = True, left.append
    if signalled:
        # The launcher sends one, and is killed then.
        found._received(signal.SIGTERM)
    for seconds in (0.0, ORPHAN_SECONDS - 1, 2.0):
        assert not left
        now[0] += seconds
        found._orphaned()
    assert left == [signal.SIGTERM]

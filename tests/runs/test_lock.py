"""One run at a time in a folder."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from tiny import tiny_trainer

from sae_accel.common.errors import InputError
from sae_accel.runs import lock
from sae_accel.runs.lock import LOCK, locked


HOLDER = """
import sys, time
from pathlib import Path
from sae_accel.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path/run`."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_holds_is_refused_with_its_name_until_it_is_gone(tmp_path, holder, capfd):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for way in ("run", "link", "run/../run"):
        with pytest.raises(InputError, match=f"process {holder.pid} on .* is at work in .*training.output_dir"):
            tiny_trainer(tmp_path / way, max_steps=1).train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    tiny_trainer(tmp_path / "run", max_steps=1).train()
    assert f"process {holder.pid}" in capfd.readouterr().err and not (tmp_path / "run" / LOCK).exists()


def test_a_file_system_without_locks_is_helped_by_what_the_owner_wrote(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(InputError, match=f"process {holder.pid}"), locked(tmp_path / "run"):
        pass
    holder.kill(), holder.wait()
    with locked(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / LOCK).read_text())
        assert owner["process"] == os.getpid()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).write_text(json.dumps(owner | {"host": "node7"}))
    with pytest.raises(InputError, match="on node7 is at work.*If that process has ended, delete"), locked(elsewhere):
        pass
    # The number of a process that ended is given again to another.
    (elsewhere / LOCK).write_text(json.dumps(owner | {"started": 0}))
    with locked(elsewhere):
        pass


def test_a_process_that_was_forked_from_a_holder_does_not_hold_on(tmp_path):
    with locked(tmp_path / "run"):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        takes = HOLDER.replace("time.sleep(60)", "")
        assert subprocess.run([sys.executable, "-c", takes, tmp_path / "run"]).returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_was_made_for_nothing_is_taken_away_again(tmp_path):
    with pytest.raises(InputError, match="no checkpoint folder"):
        tiny_trainer(tmp_path / "run", max_steps=1).train(resume_from_checkpoint="nowhere")
    assert not (tmp_path / "run").exists()


def test_a_holder_that_has_not_said_yet_who_it_is_is_waited_for(tmp_path, holder):
    owner = (tmp_path / "run" / LOCK).read_text()
    (tmp_path / "run" / LOCK).write_text("")
    threading.Timer(0.5, lambda: (tmp_path / "run" / LOCK).write_text(owner)).start()
    with pytest.raises(InputError, match=rf"process {holder.pid} on ") as raised, locked(tmp_path / "run"):
        pass
    assert "delete" not in str(raised.value)


def test_who_holds_a_lock_is_alive_whatever_is_written(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "_TO_WRITE", 0.2)
    (tmp_path / "run" / LOCK).write_text("")
    with pytest.raises(InputError, match="another run is at work") as raised, locked(tmp_path / "run"):
        pass
    assert "delete" not in str(raised.value)

"""A disk that fills while a run goes on: it costs the run nothing but what did not fit, and is told."""

import errno
import os
import subprocess
import sys

import pytest
from tiny import assert_equal, command_words, tiny_tokens, tiny_trainer, torchrun, weights

from sae_accel.common.errors import NotSaved
from sae_accel.runs import writing
from sae_accel.runs.checkpoint import missing_part
from sae_accel.train import main


# Files may not grow beyond the size of a checkpoint's parts, which no library that writes can get around.
LIMITED = """
import os, resource, sys
if os.environ.get("RANK", "0") == "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
from sae_accel.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def disk(monkeypatch):
    """Files whose writing fails: those below folders with one of the names in this set."""
    full: set[str] = set()
    save = writing.save_head

    def limited(head, weights, folder, process_index=0):
        if full & set(folder.parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(head, weights, folder, process_index)

    monkeypatch.setattr("sae_accel.training.run_state.save_head", limited)
    return full


def test_training_goes_on_and_the_next_save_is_tried_again(tmp_path, disk, capsys):
    disk.add(".checkpoint-4.partial")
    trainer = tiny_trainer(tmp_path / "run", max_steps=6, save_steps=2, save_total_limit=2)
    trainer.train()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sae_accel: ")]
    assert len(said) == 1 and f"'{tmp_path}/run/checkpoint-4' could not be saved: [Errno 28]" in said[0]
    assert "It takes 115 kB, and " in said[0] and "are free there. Training goes on" in said[0]
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-6"]
    assert trainer.saver.unsaved is None
    assert_equal(weights(trainer), weights(_whole(tmp_path)))


def _whole(tmp_path):
    trainer = tiny_trainer(tmp_path / "whole", max_steps=6)
    trainer.train()
    return trainer


def test_only_what_the_limit_lets_go_makes_room_and_never_the_last(tmp_path, disk):
    disk.update({".checkpoint-3.partial", ".checkpoint-4.partial"})
    for limit, kept in ((3, ["checkpoint-1", "checkpoint-2"]), (2, ["checkpoint-2"]), (1, ["checkpoint-2"])):
        trainer = tiny_trainer(tmp_path / str(limit), max_steps=4, save_steps=1, save_total_limit=limit)
        trainer.train()
        assert sorted(path.name for path in trainer.output_dir.glob("checkpoint-*")) == kept
        assert trainer.saver.unsaved is not None


def test_the_best_are_kept_at_the_next_evaluation(tmp_path, disk):
    disk.add("best")
    options = dict(held_out=tiny_tokens(4, seed=2), eval_steps=1, save_best=True, logging_steps=1)
    trainer = tiny_trainer(tmp_path, max_steps=1, **options)
    trainer.train()
    assert not trainer.run_state.best and trainer.saver.unsaved is not None


def test_the_exit_status_tells_that_something_is_missing(place, tmp_path, disk, capsys):
    disk.add(".checkpoint-3.partial")
    assert main(command_words(place, tmp_path)) == 1
    assert "Not all was saved: " in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "run" / "layers.1" / "model.safetensors").is_file()


def test_heads_that_cannot_be_saved_end_the_run_in_one_line_with_what_is_whole(place, tmp_path, disk, capsys):
    disk.add("layers.1")
    disk_at_the_end = command_words(place, tmp_path, **{"training.save_steps": 1})
    assert main(disk_at_the_end) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"'{tmp_path}/run' could not be saved" in error


@pytest.mark.parametrize("processes", [1, 2])
def test_a_limit_of_the_system_is_told_alike_whatever_library_meets_it(place, tmp_path, processes):
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    words = [script, *command_words(place, tmp_path, **{"training.save_steps": 2})]
    if processes == 1:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    else:
        done = torchrun(processes, words, tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("sae_accel: ")]
    # A launcher's own traceback has no line of the package.
    assert done.returncode == 1 and "/sae_accel/" not in done.stderr, done.stderr[-3000:]
    (about_the_first,) = (line for line in said if "checkpoint-2" in line)
    assert "could not be saved" in about_the_first and "File too large" in about_the_first
    assert "could not be saved" in said[-1] and not list((tmp_path / "run").glob("checkpoint-*"))


def test_what_fails_on_one_process_is_raised_with_its_reason(tmp_path):
    with pytest.raises(NotSaved, match="'.*there' could not be saved: full. It takes 5 bytes, and .* free"):
        with writing.written_together(tmp_path / "there", 5) as write:
            write(lambda: (_ for _ in ()).throw(OSError("full")))
            write(lambda: pytest.fail("nothing is tried after a failure"))
    assert missing_part(tmp_path) is not None

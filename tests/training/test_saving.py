"""A disk that fills while a run goes on: it costs the run nothing but what did not fit, and is told."""

import errno
import io
import os

import pytest
from accelerate import PartialState
from tiny import assert_equal, command_words, tiny_tokens, tiny_trainer, torchrun, weights

from sae_accel.common.errors import NotSaved
from sae_accel.common.files import remove
from sae_accel.common.manifest import Manifest
from sae_accel.runs import writing
from sae_accel.runs.checkpoint import missing_part
from sae_accel.runs.history import LogHistory
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


def test_a_disk_on_which_nothing_can_be_written_any_more_ends_no_run(tmp_path, monkeypatch, capsys):
    trainer = tiny_trainer(tmp_path, max_steps=6, save_steps=2, save_total_limit=2)
    write = Manifest.write

    def limited(manifest, folder):
        if trainer.state.global_step > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(manifest, folder)

    monkeypatch.setattr(Manifest, "write", limited)
    trainer.train()
    assert "[Errno 28]" in trainer.saver.unsaved and not missing_part(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    assert_equal(weights(trainer), weights(_whole(tmp_path)))


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_costs_nothing(tmp_path, monkeypatch, capsys):
    def limited(path):
        if path.name == "checkpoint-1":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        remove(path)

    monkeypatch.setattr("sae_accel.runs.checkpoint.remove", limited)
    trainer = tiny_trainer(tmp_path, max_steps=3, save_steps=1, save_total_limit=2)
    trainer.train()
    assert "An older checkpoint could not be deleted: [Errno 39]" in capsys.readouterr().err
    assert trainer.saver.unsaved is None and not missing_part(tmp_path / "checkpoint-3")


def test_what_was_put_aside_stays_until_the_new_branch_has_a_checkpoint_of_its_own(tmp_path, disk):
    tiny_trainer(tmp_path, max_steps=4, save_steps=1).train()
    disk.add(".checkpoint-2.partial")
    trainer = tiny_trainer(tmp_path, max_steps=2, save_steps=1, save_total_limit=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.saver.unsaved is not None
    names = {path.name.split(".")[0] for path in tmp_path.glob("checkpoint-*.before-*")}
    assert names == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


def test_what_was_there_is_there_still_if_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old.txt").write_text("old")
    replace = os.replace

    def limited(source, target):
        if source.name == ".best.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr("os.replace", limited)
    with pytest.raises(NotSaved, match="Errno 5"):
        with writing.staged(tmp_path / "best", PartialState()) as (staging, write):
            write(lambda: (staging / "new.txt").write_text("new"))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["best", "best/old.txt"]


def test_a_log_that_was_written_in_part_leaves_no_trace(tmp_path, monkeypatch):
    history = LogHistory(tmp_path)
    history.append({"step": 1})

    class Full(io.StringIO):
        def write(self, text):
            with real(tmp_path / "log_history.jsonl", "a") as file:
                file.write(text[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = open
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full())
    with pytest.raises(OSError, match="Errno 28"):
        history.append({"step": 2})
    monkeypatch.undo()
    history.append({"step": 3})
    assert (tmp_path / "log_history.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


def test_the_best_are_kept_at_the_next_evaluation(tmp_path, disk):
    disk.add("best")
    options = dict(held_out=tiny_tokens(4, seed=2), eval_steps=1, save_best=True, logging_steps=1)
    trainer = tiny_trainer(tmp_path, max_steps=1, **options)
    trainer.train()
    assert not trainer.run_state.best and trainer.saver.unsaved is not None


def test_the_exit_status_tells_that_something_is_missing(place, tmp_path, disk, capsys):
    disk.add(".checkpoint-3.partial")
    assert main(command_words(place, tmp_path)) == 1
    assert "Something was not saved: " in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "run" / "layers.1" / "model.safetensors").is_file()


def test_heads_that_cannot_be_saved_end_the_run_in_one_line_with_what_is_whole(place, tmp_path, disk, capsys):
    disk.add("layers.1")
    disk_at_the_end = command_words(place, tmp_path, **{"training.save_steps": 1})
    assert main(disk_at_the_end) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"'{tmp_path}/run' could not be saved" in error


def test_a_limit_of_the_system_is_told_alike_whatever_library_meets_it(place, tmp_path):
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    words = [script, *command_words(place, tmp_path, **{"training.save_steps": 2})]
    done = torchrun(2, words, tmp_path)
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

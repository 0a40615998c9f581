"""Which checkpoints a run keeps, which is its newest, and what becomes of those that come after an older one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from tiny import assert_equal, tiny_tokens, tiny_trainer, weights

from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.runs.checkpoint import newest_complete


def _names(folder: Path) -> list[str]:
    return sorted(path.name.split("before")[0] for path in folder.glob("checkpoint-*"))


def _trained(folder: Path, **options):
    trainer = tiny_trainer(folder, **options)
    trainer.train()
    return trainer


def test_going_on_from_an_older_checkpoint_puts_the_later_ones_aside(tmp_path, capsys):
    _trained(tmp_path, max_steps=6, save_steps=2)
    chosen = str(tmp_path / "checkpoint-2")
    changed = dict(save_steps=1, learning_rate=0.01)
    _trained(tmp_path, max_steps=3, resume_from_checkpoint=chosen, **changed)
    said = capsys.readouterr().err
    assert "checkpoint-4 to checkpoint-4.before-" in said and "training.learning_rate null, this run has 0.01" in said
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4.", "checkpoint-6."]
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"
    assert list(AutoSae.open(tmp_path)) == ["layers.1", "layers.2"]
    resumed = _trained(tmp_path, max_steps=6, resume_from_checkpoint=True, **changed)
    straight = _trained(tmp_path / "straight", max_steps=6, resume_from_checkpoint=chosen, **changed)
    assert_equal(weights(resumed), weights(straight))
    log = [json.loads(line)["step"] for line in (tmp_path / "log_history.jsonl").read_text().splitlines()]
    assert log == sorted(set(log)) and log[-1] == 6


def test_a_branch_that_has_saved_nothing_yet_is_still_the_one_to_go_on_with(tmp_path):
    _trained(tmp_path, max_steps=6, save_steps=2)

    class Killed(Exception):
        pass

    trainer = tiny_trainer(tmp_path, max_steps=6, save_steps=2, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.training_step = lambda window: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        trainer.train()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_limit_counts_what_was_written_last_and_drops_what_was_put_aside_first(tmp_path, limit):
    _trained(tmp_path, max_steps=6, save_steps=2)
    chosen = str(tmp_path / "checkpoint-2")
    _trained(tmp_path, max_steps=3, resume_from_checkpoint=chosen, save_total_limit=limit)
    kept = ["checkpoint-3", "checkpoint-2", "checkpoint-6."][:limit]
    assert _names(tmp_path) == sorted(kept)
    assert newest_complete(tmp_path).name == "checkpoint-3"


def test_checkpoints_that_somebody_put_there_are_neither_counted_nor_deleted(tmp_path):
    _trained(tmp_path / "other", max_steps=9, save_steps=1)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        shutil.copytree(tmp_path / "other" / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    _trained(tmp_path / "run", max_steps=5, save_steps=1, save_total_limit=2, resume_from_checkpoint=True)
    assert _names(tmp_path / "run") == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_of_somebody_in_the_place_of_a_later_one_is_refused(tmp_path):
    _trained(tmp_path / "other", max_steps=2, save_steps=1)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        shutil.copytree(tmp_path / "other" / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(InputError, match="holds 'checkpoint-2', which no run"):
        _trained(tmp_path / "run", max_steps=5, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_links_to_checkpoints_are_followed_and_removed_as_links(tmp_path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    _trained(run, max_steps=4, save_steps=2)
    disk.mkdir()
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.move(run / name, disk / name)
        (run / name).symlink_to(disk / name)
    resumed = _trained(run, max_steps=6, save_total_limit=1, resume_from_checkpoint=True)
    assert _names(run) == ["checkpoint-6"] and _names(disk) == ["checkpoint-2", "checkpoint-4"]
    assert_equal(weights(resumed), weights(_trained(tmp_path / "whole", max_steps=6)))


def test_heads_are_saved_through_a_link_to_another_disk(tmp_path):
    # A file system of its own, to which nothing can be moved from the run's.
    disk = Path("/dev/shm") / tmp_path.name
    disk.mkdir()
    try:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "layers.1").symlink_to(disk)
        _trained(tmp_path / "run", max_steps=1)
        assert (disk / "model.safetensors").is_file() and (tmp_path / "run" / "layers.1").is_symlink()
        (disk / "model.safetensors").chmod(0o400)
        _trained(tmp_path / "run", max_steps=2, resume_from_checkpoint=True)
    finally:
        shutil.rmtree(disk)


def test_a_checkpoint_holds_no_history(tmp_path):
    short, long = (_trained(tmp_path / str(n), max_steps=n, logging_steps=1) for n in (2, 12))
    sizes = [
        sum((trainer.output_dir / f"checkpoint-{n}" / name).stat().st_size for name in names)
        for trainer, n in ((short, 2), (long, 12))
        for names in (("trainer_state.json", "training_state.pt"),)
    ]
    assert abs(sizes[1] - sizes[0]) < 100
    assert len((tmp_path / "12" / "log_history.jsonl").read_text().splitlines()) == 12


def test_what_somebody_put_into_a_checkpoint_outlives_it(tmp_path, capsys):
    _trained(tmp_path, max_steps=2, save_steps=1)
    (tmp_path / "checkpoint-1" / "notes").mkdir()
    (tmp_path / "checkpoint-1" / "notes" / "findings.md").write_text("mine")
    (tmp_path / "checkpoint-2" / "layers.1" / "probe.pt").write_text("mine too")
    _trained(tmp_path, max_steps=3, save_steps=1, save_total_limit=2, resume_from_checkpoint=True)
    assert (tmp_path / "kept-from-checkpoint-1" / "notes" / "findings.md").read_text() == "mine"
    assert f"are kept in '{tmp_path / 'kept-from-checkpoint-1'}'" in capsys.readouterr().err
    _trained(tmp_path, max_steps=3, save_steps=1, overwrite_output_dir=True)
    assert (tmp_path / "kept-from-checkpoint-2" / "layers.1" / "probe.pt").read_text() == "mine too"
    assert _names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_of_a_checkpoint_that_is_a_link_the_data_stay_and_are_named(tmp_path, capsys):
    _trained(tmp_path / "run", max_steps=2, save_steps=1)
    shutil.move(tmp_path / "run" / "checkpoint-1", tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    _trained(tmp_path / "run", max_steps=3, save_steps=1, save_total_limit=2, resume_from_checkpoint=True)
    assert f"its target '{tmp_path / 'elsewhere'}' stays" in capsys.readouterr().err
    assert _names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"] and (tmp_path / "elsewhere").is_dir()


def test_a_run_that_has_ended_and_is_started_again_says_so_and_keeps_its_numbers(tmp_path, capsys):
    _trained(tmp_path, max_steps=3, save_steps=1)
    before = json.loads((tmp_path / "metrics.json").read_text())
    trainer = _trained(tmp_path, max_steps=3, save_steps=1, resume_from_checkpoint=True)
    assert "checkpoint-3' is at step 3, so nothing is left to train." in capsys.readouterr().err
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert before.pop("train/tokens_per_second") > 0 and after == before
    assert trainer.state.global_step == 3


def test_other_rows_under_the_same_name_are_refused(tmp_path):
    _trained(tmp_path, max_steps=2, save_steps=1)
    # A column that nobody reads is no part of what they are.
    rows = tiny_tokens()
    rows = rows.add_column("text", ["x"] * len(rows))
    grown = concatenate_datasets([rows, rows.select([3])])
    tiny_trainer(tmp_path, max_steps=3, train=grown).train(resume_from_checkpoint=True)
    other = concatenate_datasets([rows.select([3]), rows])
    trainer = tiny_trainer(tmp_path, max_steps=4, train=other)
    with pytest.raises(InputError, match="comes from other data: it has data.rows .*, this run has"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path):
    _trained(tmp_path, max_steps=1, save_steps=1)
    path = tmp_path / "checkpoint-1" / "training_state.pt"
    torch.save({"sequences": 4}, path)
    manifest = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())
    manifest["files"]["training_state.pt"] = path.stat().st_size
    (tmp_path / "checkpoint-1" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="written by another version of sae_accel. Go on with that version"):
        tiny_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    heads = str(tmp_path / "checkpoint-1")
    tiny_trainer(tmp_path / "other", max_steps=1, init_from=heads).train()

"""Output folders that cannot be written to, and disks without room, before an LM's weights are read."""

import os
import re
from pathlib import Path

import pytest
from tiny import command_words, forbid_loading, tiny_trainer

from sae_accel.common.errors import InputError
from sae_accel.recipe.arguments import HeadArguments, LoraArguments
from sae_accel.runs.room import check_room, check_writable
from sae_accel.train import main
from sae_accel.training.sizes import checkpoint_bytes, head_bytes


GB = 10**9


def _line(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sae_accel: ")]
    return line


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("output_dir", "says"),
    [
        ("file/run", "'{}/file/run' cannot be written to: [Errno 20] Not a directory"),
        ("file", "'{}/file' cannot be written to: [Errno 17] File exists"),
        ("dangling", "'{}/dangling' is a link to 'nowhere', which does not exist. Make the target folder, or set"),
        ("dangling/run", "'{}/dangling' is a link to 'nowhere', which does not exist."),
        ("/proc/run", "'/proc/run' cannot be written to: [Errno 2]"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_lm_is_read(
    place, tmp_path, monkeypatch, capsys, output_dir, says, words
):
    forbid_loading(monkeypatch)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    folder = tmp_path / output_dir
    assert main([*command_words(place, tmp_path, **{"training.output_dir": folder}), *words]) == 2
    assert f"training.output_dir: {says.format(tmp_path)}" in _line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_tried_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / "there", ["layers.1"])
    check_writable(tmp_path / "new" / "run", [])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_of_a_head_that_leads_nowhere_it_can_write_is_found(tmp_path):
    (tmp_path / "layers.1").symlink_to("/proc/self")
    with pytest.raises(InputError, match="'.*/layers.1' cannot be written to"):
        check_writable(tmp_path, ["layers.1"])


@pytest.mark.parametrize(
    ("keep", "free", "says"),
    [
        (None, 12 * GB, "A checkpoint takes 2.0 GB; 12.0 GB are free in '{}', enough for 5. The run keeps all; "),
        (None, 12_000 * GB, "A checkpoint takes 2.0 GB; 12,000.0 GB are free in '{}'."),
        (3, 12 * GB, "enough for the 3 that the run keeps."),
        (4, 10 * GB, "not enough for training.save_total_limit = 4 and one more during a save. Set it to 3, or make"),
        (4, 3 * GB, "not enough for training.save_total_limit = 4 and one more during a save. Make room."),
    ],
)
def test_room_is_stated(tmp_path, monkeypatch, keep, free, says):
    monkeypatch.setattr("sae_accel.runs.room.free_bytes", lambda folder: free)
    assert says.format(tmp_path / "run") in check_room(tmp_path / "run", 2 * GB, GB, keep)


def test_a_disk_without_room_for_a_checkpoint_and_the_heads_is_refused(place, tmp_path, monkeypatch, capsys):
    forbid_loading(monkeypatch)
    monkeypatch.setattr("sae_accel.runs.room.free_bytes", lambda folder: 60_000)
    assert main(command_words(place, tmp_path)) == 2
    line = _line(capsys)
    assert re.search(
        r"a checkpoint takes \d+ kB and the heads \d+ kB, but only 60 kB are free in '.*/run'\. Make room", line
    )
    assert not (tmp_path / "run").exists()


def test_what_a_run_deletes_first_and_what_it_has_already_count_as_room(place, tmp_path, monkeypatch, capsys):
    words = {"training.save_steps": 1, "training.save_total_limit": 2}
    assert main(command_words(place, tmp_path, **words)) == 0
    forbid_loading(monkeypatch)
    monkeypatch.setattr("sae_accel.runs.room.free_bytes", lambda folder: 200_000)
    anew = {"training.overwrite_output_dir": "true"}
    assert main([*command_words(place, tmp_path, **words, **anew), "--dry-run"]) == 0
    assert "enough for the 2 that the run keeps" in capsys.readouterr().out
    go_on = {"training.resume_from_checkpoint": "true", "training.max_steps": 5}
    assert main([*command_words(place, tmp_path, **words | go_on), "--dry-run"]) == 0
    assert "enough for the 2 that the run keeps" in capsys.readouterr().out


LORA = LoraArguments(rank=8, target_modules="layers.2.mlp.*_proj", train_heads=True)


@pytest.mark.parametrize("optim", ["signum", "adam", "adam8bit", "muon"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["heads", "with a LoRA"])
def test_what_a_checkpoint_takes_is_what_was_said(tmp_path, optim, lora):
    heads = [HeadArguments(hookpoints="layers.1", k=4, expansion_factor=300, skip_connection=True, type="transcoder")]
    heads += [HeadArguments(hookpoints="layers.0", k=4, expansion_factor=200)]
    options = {} if lora is None else {"loss": "ce", "lora": lora}
    trainer = tiny_trainer(tmp_path, heads, max_steps=1, save_steps=1, optim=optim, **options)
    trainer.train()
    shapes = [parameter.shape for parameter in trainer.run_state.bank.adapter]
    said = checkpoint_bytes(trainer.plans.values(), trainer.args, shapes)
    assert _size(tmp_path / "checkpoint-1") == pytest.approx(said, rel=0.02)
    assert sum(_size(tmp_path / name) for name in trainer.plans) == pytest.approx(
        head_bytes(trainer.plans.values()), rel=0.02
    )


def _size(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())

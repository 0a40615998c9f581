"""What a run deletes of what its folder holds, and what it refuses to write over."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import command_words, forbid_loading, tiny_llama, tiny_tokens, tiny_trainer

from sae_accel import push
from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel
from sae_accel.recipe.arguments import HeadArguments
from sae_accel.train import main


OVERWRITE = {"training.overwrite_output_dir": "true"}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _somebodys(folder: Path) -> dict[str, bytes]:
    """An LM, a fine-tuned one, another run, a head and notes, in a folder in which a run is to be."""
    tiny_llama().save_pretrained(folder / "lm")
    tiny_llama().save_pretrained(folder / "outputs" / "finetuned" / "checkpoint-7")
    tiny_trainer(folder / "other", max_steps=1).train()
    SaeModel(SaeConfig(d_in=24, k=4)).save_pretrained(folder / "kept" / "layers.1")
    for name in ("notes.txt", "README.md", "logs/mine.txt", "logs/other/events.out.tfevents.1", "plots/mine.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return _files(folder)


@pytest.mark.parametrize("ended", [True, False])
def test_overwriting_deletes_what_a_run_left_and_nothing_else(tmp_path, ended):
    mine = _somebodys(tmp_path)
    options = dict(held_out=tiny_tokens(4), eval_steps=1, save_best=True, report_to="tensorboard", max_steps=2)
    first = tiny_trainer(tmp_path, run_name="run", **options)
    if ended:
        first.train()
    else:
        first.save_model = lambda *_: (_ for _ in ()).throw(SystemExit("killed"))
        with pytest.raises(SystemExit):
            first.train()
    assert _files(tmp_path).items() > mine.items()
    heads = [HeadArguments(hookpoints="layers.0", k=4, expansion_factor=4)]
    tiny_trainer(tmp_path, heads=heads, max_steps=3, run_name="run", overwrite_output_dir=True).train()
    left = _files(tmp_path)
    assert mine.items() < left.items()
    new = {name.split("/")[0] for name in left.keys() - mine.keys()}
    reports = {"latent_frequency.safetensors", "log_history.jsonl", "metrics.json", "trainer_state.json", "plots"}
    assert new == {"checkpoint-3", "layers.0", "manifest.json", *reports}


@pytest.mark.parametrize("output_dir", [".", "{}/x/..", "runs/", "link", "~/mine"])
def test_the_lm_that_a_run_reads_and_other_runs_outlive_it(place, tmp_path, monkeypatch, output_dir, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "x").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    typed = output_dir.format(tmp_path)
    target = Path(typed).expanduser()
    tiny_llama().save_pretrained(target / "finetuned")
    assert main(command_words(place, tmp_path, **{"training.output_dir": target / "earlier"})) == 0
    before = _files(target)
    words = command_words(place, tmp_path, **{"training.output_dir": typed} | OVERWRITE)
    for _ in range(2):
        assert main(words) == 0
        assert before.items() < _files(target).items()
    # From the card to the release, the run's own heads and nothing else.
    assert list(AutoSae.from_pretrained(typed)) == ["layers.1", "layers.2"]
    assert "finetuned" not in (target / "README.md").read_text()
    assert push.main([typed, "name", "--dry-run"]) == 0
    sent = {line.split()[0].split("/")[0] for line in capsys.readouterr().out.splitlines() if "/config.json" in line}
    assert sent == {"layers.1", "layers.2"}
    assert not (tmp_path / "~").exists()


def test_what_is_deleted_is_told_before_with_its_size_and_by_a_dry_run_too(place, tmp_path, capsys):
    words = command_words(place, tmp_path, **OVERWRITE)
    assert main(words) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-3").rglob("*") if path.is_file())
    before = _files(tmp_path / "run")
    told = rf"checkpoint-3 \({size / 1000:.0f} kB\), layers.1 \(20 kB\), layers.2"
    assert main([*words, "--dry-run"]) == 0
    assert re.search("the run would delete " + told, capsys.readouterr().out) and _files(tmp_path / "run") == before
    assert main(words) == 0
    assert re.search("Deleting the files of an earlier run in .*: " + told, capsys.readouterr().err)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: tiny_llama().save_pretrained(folder / "layers.1"), "layers.1"),
        (lambda folder: SaeModel(SaeConfig(d_in=24, k=4)).save_pretrained(folder / "layers.1"), "layers.1"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "manifest.json"),
        (lambda folder: (folder / "log_history.jsonl").write_text("{}"), "log_history.jsonl"),
        (lambda folder: (folder / "layers.1").write_text("mine"), "layers.1"),
        (lambda folder: tiny_llama().save_pretrained(folder / "checkpoint-1"), "checkpoint-1"),
        (lambda folder: (folder / "metrics.json").write_text('{"accuracy": 0.9}'), "metrics.json"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"epoch": 3}'), "trainer_state.json"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / "latent_frequency.safetensors"), "latent_frequency"),
        (lambda folder: (folder / "best").mkdir() or (folder / "best" / "a.txt").write_text("mine"), "best/a.txt"),
    ],
)
def test_a_run_refuses_to_write_over_what_no_run_left(tmp_path, make, named, overwrite):
    make(tmp_path)
    before = _files(tmp_path)
    options = dict(held_out=tiny_tokens(4), eval_steps=1, save_best=True)
    trainer = tiny_trainer(tmp_path, max_steps=1, overwrite_output_dir=overwrite, **options)
    with pytest.raises(InputError, match=f"holds '{named}.*which no run of sae_accel has written"):
        trainer.train()
    assert _files(tmp_path) == before


def test_somebodys_recipe_and_lora_are_refused_before_the_lm_is_read(place, tmp_path, capsys, monkeypatch):
    forbid_loading(monkeypatch)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    for name in ("recipe.yaml", "adapter/adapter_config.json"):
        (tmp_path / "run" / name).write_text("{}")
        changes = {"training.loss": "ce", "lora.train_heads": "true"} | OVERWRITE
        assert main(command_words(place, tmp_path, **changes)) == 2
        assert f"holds {name.removesuffix('/adapter_config.json')!r}, which no run" in capsys.readouterr().err
        (tmp_path / "run" / name).unlink()


def test_of_a_link_the_link_goes_and_not_what_it_leads_to(tmp_path):
    tiny_trainer(tmp_path / "run", max_steps=2, save_steps=1).train()
    (tmp_path / "elsewhere").mkdir()
    for name in ("checkpoint-1", "layers.1"):
        (tmp_path / "run" / name).rename(tmp_path / "elsewhere" / name)
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / name)
    before = _files(tmp_path / "elsewhere")
    tiny_trainer(tmp_path / "run", max_steps=1, overwrite_output_dir=True).train()
    assert _files(tmp_path / "elsewhere") == before
    assert not (tmp_path / "run" / "layers.1").is_symlink()


def test_what_only_looks_like_a_runs_own_stays(tmp_path, capsys):
    tiny_trainer(tmp_path, max_steps=2, save_steps=1).train()
    for name in (
        "layers.1/model_finetuned.safetensors",
        "layers.1/model.best.safetensors",
        f"logs/{tmp_path.name}/events.out.tfevents.mine",
        ".README.md.old",
        ".checkpoint-9.old/weights.pt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    tiny_trainer(tmp_path, max_steps=2, overwrite_output_dir=True).train()
    assert len([path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]) == 5

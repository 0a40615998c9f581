import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import command_words

from sae_accel.loading.auto import AutoSae
from sae_accel.train import main


def test_a_run_trains_saves_and_ends_with_a_table_and_next_steps(place, tmp_path, capsys):
    assert main(command_words(place, tmp_path)) == 0
    out = capsys.readouterr().out
    table = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("layers.")}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert float(table["layers.1"][-4]) == pytest.approx(metrics["eval/fvu/layers.1"], abs=1e-4)
    assert float(table["layers.2"][-3]) == pytest.approx(metrics["eval/l0/layers.2"], abs=0.1)
    assert "tokens/s" in out and "tensorboard" not in out and "AutoSae.from_pretrained" in out
    saes = AutoSae.from_pretrained(tmp_path / "run")
    assert list(saes) == ["layers.1", "layers.2"] and saes["layers.1"].config.base_model_name_or_path
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "README.md",
        "checkpoint-3",
        "latent_frequency.safetensors",
        "layers.1",
        "layers.2",
        "log_history.jsonl",
        "manifest.json",
        "metrics.json",
        "plots",
        "recipe.yaml",
        "trainer_state.json",
    ]


def test_a_saved_recipe_runs_again_to_the_same_weights(place, tmp_path):
    assert main(command_words(place, tmp_path)) == 0
    again = [str(tmp_path / "run" / "recipe.yaml"), "--training.output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = (AutoSae.from_pretrained(tmp_path / name)["layers.2"] for name in ("run", "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_run_with_all_that_it_can_leave_is_deleted_whole_by_the_next(place, tmp_path, capsys):
    end_to_end = {"training.loss": "ce", "lora.train_heads": "true"}
    kept = {"training.save_best": "true", "training.eval_steps": 1, "training.report_to": "tensorboard"}
    assert main(command_words(place, tmp_path, **end_to_end, **kept)) == 0
    assert f"tensorboard --logdir {tmp_path}/run/logs" in capsys.readouterr().out
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter", "best", "logs", "checkpoint-3"} <= found
    again = command_words(place, tmp_path, **{"training.overwrite_output_dir": "true", "heads.hookpoints": "layers.0"})
    assert main(again) == 0
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint-3", "layers.0"} < left and not {"adapter", "best", "logs", "layers.1", "layers.2"} & left


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name_or_path": "nobody/nothing"}, "model.name_or_path: 'nobody/nothing' cannot be loaded"),
        ({"model.name_or_path": "{}/text.jsonl"}, "is a file. Name the folder"),
        ({"data.path": "nobody/nothing"}, "data.path: 'nobody/nothing' cannot be loaded"),
        ({"data.text_column": "body"}, "no column 'body'; it has text"),
        ({"data.ctx_len": 5000}, "less than one sequence"),
        ({"data.eval_examples": 500}, "none is left to train on"),
        ({"training.per_device_train_batch_size": 500}, "fewer than one batch of 500"),
        ({"heads.hookpoints": "layers.9"}, "'layers.9' matches no module"),
        ({"heads.k": 1000}, "k is 1000"),
        ({"heads.k": -1}, "the least allowed is 1"),
        ({"heads.activation": "groupmax", "heads.k": 7}, "groupmax"),
        ({"training.report_to": "mlflow"}, "mlflow is not installed"),
        ({"training.resume_from_checkpoint": "nowhere"}, "no checkpoint folder 'nowhere'"),
    ],
)
def test_bad_input_ends_with_status_2_one_line_and_nothing_written(place, tmp_path, capsys, changes, message):
    changes = {key: str(value).format(place) for key, value in changes.items()}
    assert main(command_words(place, tmp_path, **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("sae_accel: ")
    assert not list((tmp_path / "run").glob("layers*"))


def test_the_command_works_from_any_folder_as_accelerate_launches_it(place, tmp_path):
    accelerate = os.path.join(os.path.dirname(sys.executable), "accelerate")
    launch = [accelerate, "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    command = [*launch, "--dynamo_backend", "no", "-m", "sae_accel.train", *command_words(place, tmp_path)]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"PYTHONPATH": root, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FVU" in done.stdout and "Traceback" not in done.stderr and "arning" not in done.stderr


def test_bad_input_gives_status_2_to_the_shell(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "sae_accel.train", "nothing.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("sae_accel: There is no recipe 'nothing.yaml'")
    assert len(done.stderr.splitlines()) == 1

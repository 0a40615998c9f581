import os
import re
import subprocess
import sys

import pytest
import torch
from tiny import command_words, torchrun

import sae_accel.convert as convert
import sae_accel.push as push
import sae_accel.train as train
from sae_accel.__main__ import main
from sae_accel.common.errors import InputError
from sae_accel.common.secrets import HIDDEN, without_secrets
from sae_accel.loading.auto import AutoSae
from sae_accel.training.trainer import SaeTrainer


TOKEN = "abcd-1234-efgh"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where a report goes if no run has a folder yet."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def fails_with(monkeypatch, error, owner=SaeTrainer, name="train"):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(owner, name, fail)


def commands(place, tmp_path):
    """Each command, with what does its work."""
    from sae_accel.hub.release import Release

    yield train.main, command_words(place, tmp_path), SaeTrainer, "train"
    yield push.main, [str(place), "nobody/nothing"], Release, "__init__"
    yield convert.main, [str(place), str(tmp_path / "to"), "--to", "saelens"], AutoSae, "open"


@pytest.mark.parametrize("which", range(3))
def test_a_defect_is_one_line_with_the_place_of_a_report(place, tmp_path, monkeypatch, capsys, which):
    command, words, owner, name = list(commands(place, tmp_path))[which]
    fails_with(monkeypatch, KeyError("what was not foreseen\nand more"), owner, name)
    assert command(words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("sae_accel: KeyError: 'what was not foreseen") and "--debug" in line
    (report,) = (tmp_path / "here").glob("sae_accel-error-*.txt")
    assert f"'{report.name}'" in line
    text = report.read_text()
    assert "Traceback" in text and "in fail" in text and f"torch {torch.__version__}" in text
    assert all(word in text for word in words[:2])


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("position", [0, -1])
def test_debug_shows_the_report_and_writes_none(place, tmp_path, monkeypatch, capsys, which, position):
    command, words, owner, name = list(commands(place, tmp_path))[which]
    fails_with(monkeypatch, KeyError("what was not foreseen"), owner, name)
    words.insert(position if position == 0 else len(words), "--debug")
    assert command(words) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "in fail" in error and "Versions" in error
    assert error.strip().splitlines()[-1].startswith("sae_accel: KeyError")
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("words", [["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]])
def test_debug_shows_where_bad_input_was_found(capsys, words):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert main([word for word in words if word != "--debug"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sae_accel: There is no recipe 'no.yaml'") and error.splitlines()[-1] == line


@pytest.mark.parametrize("command", ["train", "push", "convert"])
def test_every_help_tells_of_debug(command, capsys):
    try:
        status = main([command, "--help"])
    except SystemExit as end:
        status = end.code
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 0 and "--debug" in shown and "traceback" in shown


def test_the_report_of_a_run_lies_in_its_folder_with_its_recipe(place, tmp_path, monkeypatch, capsys):
    assert train.main(command_words(place, tmp_path)) == 0
    fails_with(monkeypatch, KeyError("x"))
    assert train.main(command_words(place, tmp_path, **{"training.overwrite_output_dir": "true"})) == 1
    (report,) = (tmp_path / "run").glob("sae_accel-error-*.txt")
    assert "per_device_train_batch_size: 8" in report.read_text()
    monkeypatch.undo()
    assert train.main(command_words(place, tmp_path, **{"training.overwrite_output_dir": "true"})) == 0
    assert report.exists() and not list((tmp_path / "here").iterdir())


def test_a_folder_that_is_no_runs_gets_no_report(place, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    fails_with(monkeypatch, KeyError("x"))
    assert train.main(command_words(place, tmp_path)) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_where_no_folder_can_be_written_to_the_report_is_shown(place, tmp_path, monkeypatch, capsys):
    fails_with(monkeypatch, KeyError("x"))
    monkeypatch.setattr("sae_accel.common.reports.Reports._folders", lambda self: [tmp_path / "nowhere"])
    assert train.main(command_words(place, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "in fail" in error and "the report is above" in error.splitlines()[-1]


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_secret_is_in_a_report_nor_on_the_screen(place, tmp_path, monkeypatch, capsys, debug):
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment")
    fails_with(monkeypatch, KeyError(f"{TOKEN} of-the-environment https://me:pass-word@hub.co/x?sig=si-gna-ture"))
    words = command_words(
        place,
        tmp_path,
        **{"model.token": TOKEN, "data.load_args": "{token: nested-token, storage_options: {secret: deep-secret}}"},
    )
    assert train.main([*words, *debug]) == 1
    said = "".join(capsys.readouterr()) + "".join(path.read_text() for path in (tmp_path / "here").iterdir())
    assert "Recipe" in said and "KeyError" in said
    for secret in (TOKEN, "of-the-environment", "nested-token", "deep-secret", "pass-word", "si-gna-ture"):
        assert secret not in said


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Authorization: Bearer abcdefghijkl", "abcdefghijkl"),
        ("token hf_ABCDEFGHIJKLMNOPQRST ends", "hf_ABCDEFGHIJKLMNOPQRST"),
        ("s3://key:word@bucket/file", "key:word"),
        ("https://cdn/x?X-Amz-Signature=0af&b=1", "0af"),
        ("{'hub_token': 'qwertz'}", "qwertz"),
        ("model.token: qwertz", "qwertz"),
        ("--training.hub_token=qwertz", "qwertz"),
    ],
)
def test_whatever_has_the_shape_of_a_secret_is_hidden(text, hidden):
    assert hidden not in without_secrets(text) and HIDDEN in without_secrets(text)


@pytest.mark.parametrize(
    "text", ["exclude_tokens: [1, 2]", "max_tokens: 100", "token_dtype: uint16", "token: null", "a key: value"]
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


def test_a_token_of_the_data_is_in_no_saved_recipe(place, tmp_path):
    assert train.main(command_words(place, tmp_path, **{"data.load_args": "{token: nested-token}"})) == 0
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"nested-token" not in path.read_bytes(), path


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        OSError(12, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("where", ["training", "loading"])
def test_too_little_memory_is_foreseen(place, tmp_path, monkeypatch, capsys, error, where):
    if where == "training":
        fails_with(monkeypatch, error)
    else:
        fails_with(monkeypatch, error, sys.modules["transformers"].AutoModel, "from_pretrained")
    assert train.main(command_words(place, tmp_path)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sae_accel: There is not enough memory")
    assert all(f"--{option}"[2:] in line for option in ("per_device_train_batch_size", "micro_batches", "ctx_len"))
    assert not list((tmp_path / "here").iterdir())


def test_called_from_python_errors_are_raised_as_they_are(tmp_path, monkeypatch):
    with pytest.raises(InputError):
        AutoSae.from_pretrained(tmp_path / "nothing")
    fails_with(monkeypatch, KeyError("x"), AutoSae, "open")
    with pytest.raises(KeyError):
        AutoSae.open(tmp_path)


ON_PROCESSES = """
import os, sys
from sae_accel.training.trainer import SaeTrainer
who = sys.argv.pop(1)
train = SaeTrainer.train
def fail(self, *args, **kwargs):
    if who in ("all", os.environ["RANK"]):
        raise KeyError("what was not foreseen")
    return train(self, *args, **kwargs)
SaeTrainer.train = fail
from sae_accel.train import main
sys.exit(main())
"""


@pytest.mark.parametrize("who", ["all", "1"])
def test_each_process_with_a_defect_writes_a_report_and_one_line_is_said(place, tmp_path, who):
    script = tmp_path / "script.py"
    script.write_text(ON_PROCESSES)
    done = torchrun(2, [script, who, *command_words(place, tmp_path)], tmp_path / "here")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("sae_accel: ") and "KeyError" in line]
    reports = [path.name for path in (tmp_path / "here").glob("sae_accel-error-*.txt")]
    assert len(lines) == 1 and any(name in lines[0] for name in reports), done.stderr
    ranks = {re.search(r"process-(\d+)", name)[1] for name in reports}
    assert ranks == {"0", "1"} if who == "all" else ranks == {who}


def test_deepspeed_says_nothing_of_its_own_accord_and_its_warnings_stay():
    pytest.importorskip("deepspeed")
    code = """
import sae_accel
from sae_accel import AutoSae
from accelerate import Accelerator
from deepspeed.accelerator import get_accelerator
get_accelerator()
from deepspeed.utils import logger
logger.warning("of another kind")
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith("of another kind")


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        (convert.main, ["a", "b", "--to", "nowhere"], "invalid choice"),
        (convert.main, ["a", "b", "--to", "saelens", "--k", "x"], "invalid int"),
        (convert.main, ["a", "b", "--to", "saelens", "--deb"], "unrecognized"),
        (push.main, [], "required"),
    ],
)
def test_words_that_a_command_does_not_know_are_one_line(capsys, command, words, says):
    assert command(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sae_accel: ") and says in line and "--help" in line


def test_a_name_that_is_too_long_is_bad_input(tmp_path, capsys):
    assert push.main(["a" * 300, "nobody/nothing", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("cannot be used: File name too long.")


def test_a_file_that_the_machine_refuses_is_no_defect(place, tmp_path, monkeypatch, capsys):
    fails_with(monkeypatch, PermissionError(13, "Permission denied", "/somewhere/file"))
    assert train.main(command_words(place, tmp_path)) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sae_accel: '/somewhere/file' cannot be used: Permission denied.")
    assert not list((tmp_path / "here").iterdir())


def test_a_name_that_the_terminal_cannot_show_is_no_reason_to_end(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": root}
    words = [sys.executable, "-m", "sae_accel", "train", "wéïrd.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"sae_accel: There is no recipe 'w\\xe9\\xefrd.yaml'")

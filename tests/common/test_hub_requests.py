"""The Hub as it may be: slow, silent, busy, changing, or something else that answers in its place."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_repos import File
from hub_server import HubServer
from huggingface_hub import hf_hub_download
from safetensors.torch import load, save
from tiny import command_words, tiny_trainer
from transformers import TrainerCallback

from sae_accel import AutoSae, push, train
from sae_accel.bank.init_from import open_pretrained
from sae_accel.common import hub_requests
from sae_accel.common.errors import InputError
from sae_accel.common.hub_requests import TRIES
from sae_accel.hub.release import Release
from sae_accel.loading.convert import convert


# The client gives httpx files to upload in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[2]
NAME = "user/saes"


@pytest.fixture
def waits():
    """Seconds that were to be waited."""
    return []


@pytest.fixture
def hub(tmp_path, monkeypatch, waits):
    """The Hub of this process, with an empty cache; lists waits instead of waiting."""
    with HubServer(tmp_path / "hub", private=("user/closed",)) as hub:
        for name, value in hub.settings(tmp_path / "cache").items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic, time=time.time)
        for module in (
            "huggingface_hub.utils._http",
            "huggingface_hub.file_download",
            "sae_accel.common.hub_requests",
        ):
            monkeypatch.setattr(f"{module}.time", clock)
        hub.token = "secret"
        monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: hub.token)
        monkeypatch.setattr("huggingface_hub.utils._headers.detect_agent", lambda: None)
        yield hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with two heads, which no test changes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    tiny_trainer(folder, max_steps=1).train()
    return folder


@pytest.fixture
def released(hub, trained):
    """The repo `user/saes` with the heads, and requests that are counted from here."""
    Release(trained, NAME).push()
    hub.requests.clear()
    return trained


@pytest.fixture
def soon(monkeypatch):
    """Time limits of tenths of a second."""
    for name, seconds in (("TO_ANSWER", 0.4), ("TO_COMMIT", 0.4), ("TOLD_AFTER", 0.2)):
        monkeypatch.setattr(hub_requests, name, seconds)
    # Some requests have a limit of the client's own.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.4)


def _line(call, *arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value) and "Expecting value" not in str(error.value)
    return str(error.value)


def _weights(cache: Path) -> dict[str, torch.Tensor]:
    return {name: head.W_dec for name, head in AutoSae.open(NAME, cache_dir=cache).items()}


FAULTS = {
    "429": lambda hub, at: hub.fail_at(at, 429, {"Retry-After": "7"}),
    "500": lambda hub, at: hub.fail_at(at, 500),
    "503": lambda hub, at: hub.fail_at(at, 503),
    "cut": lambda hub, at: hub.cut_at(at),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whichever_request_of_a_reader_fails_for_a_moment_it_is_made_again(hub, released, tmp_path, fault, waits):
    expected = _weights(tmp_path / "first")
    count = len(hub.requests)
    assert count >= 2 + 2 * 4 and len(expected) == 2
    for at in range(count):
        hub.requests.clear()
        waits.clear()
        FAULTS[fault](hub, at)
        found = _weights(tmp_path / str(at))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert len(hub.requests) == count + 1 and (fault != "429" or waits == [7.0])


@pytest.mark.parametrize("fault", FAULTS)
def test_whichever_request_of_a_push_fails_for_a_moment_it_is_made_again(hub, trained, fault):
    Release(trained, "user/whole").push()
    count, at = len(hub.requests), 0
    # Each request but those that ask for what is there: in four runs, every fault meets each.
    for at in range(list(FAULTS).index(fault), count, len(FAULTS)):
        hub.requests.clear()
        FAULTS[fault](hub, at)
        Release(trained, f"user/saes{at}").push()
        assert len(hub.commits(f"user/saes{at}")) == 2
        assert hub.files(f"user/saes{at}").keys() == hub.files("user/whole").keys()
    assert at > 0


def test_a_wait_that_the_hub_asks_for_is_kept_by_seconds_date_and_limits_unless_it_is_too_long(hub, released, waits):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    for headers, low, high in (
        ({"Retry-After": "11"}, 11, 11),
        ({"Retry-After": date}, 90, 101),
        ({"RateLimit": '"api";r=0;t=55'}, 55, 55),
    ):
        waits.clear()
        hub.fail(None, f"/api/models/{NAME}", 429, headers=headers)
        assert len(AutoSae.open(NAME)) == 2
        assert len(waits) == 1 and low <= waits[0] <= high
    waits.clear()
    hub.fail(None, f"/api/models/{NAME}", 429, headers={"Retry-After": "4000"})
    assert "answered 429 and asked to wait 4000 s" in _line(AutoSae.open, NAME) and not waits


def test_a_hub_that_does_not_answer_is_told_of_and_left(hub, released, tmp_path, soon, capsys):
    hub.stall("/resolve/", times=100)
    heads = AutoSae.open(NAME)
    began = time.monotonic()
    line = _line(heads.load, "layers.1")
    assert time.monotonic() - began < 20
    assert line.startswith(f"'{NAME}' cannot be read: the Hub was asked for HEAD ") and "gave no answer" in line
    assert f"sae_accel: Still fetching layers.1/config.json of '{NAME}' (" in capsys.readouterr().err
    hub.mend()
    hub.stall("/commit/", times=100)
    line = _line(Release(released, "user/other").push)
    assert "'user/other' cannot be pushed to: the Hub was asked for POST " in line and line.endswith("is sent twice.")
    assert "Still pushing to 'user/other'" in capsys.readouterr().err


def test_requests_of_others_stay_as_they_were(hub, released, monkeypatch):
    AutoSae.open(NAME)
    limits = []
    send = hub_requests._set_limits
    monkeypatch.setattr(hub_requests, "_set_limits", lambda request: limits.append(request.url) or send(request))
    hf_hub_download(NAME, "layers.1/config.json")
    assert not limits
    AutoSae.open(NAME)
    assert limits


@pytest.mark.parametrize("status", [None, 500])
def test_what_the_client_asks_for_its_statistics_is_nobodys_loss(hub, released, monkeypatch, status):
    monkeypatch.undo()
    for name, value in hub.settings(hub.root / "cache").items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._REGISTRY_FETCH_TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(hub.root / "harnesses.json"))
    if status is None:
        hub.stall("/api/agent-harnesses")
    else:
        hub.fail("GET", "/api/agent-harnesses", status)
    assert len(AutoSae.open(NAME)) == 2
    assert sum("/api/agent-harnesses" in line for line in hub.requests) == 1


def test_the_cache_stands_in_where_the_hub_is_not_there_but_not_where_it_fails(
    hub, released, tmp_path, monkeypatch, capsys
):
    AutoSae.open(NAME).load("layers.1")
    hub.fail(None, f"/api/models/{NAME}", 502, times=TRIES)
    assert "it answered 502. Try again later." in _line(AutoSae.open, NAME)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    capsys.readouterr()
    heads = AutoSae.open(NAME)
    err = capsys.readouterr().err
    assert list(heads) == ["layers.1"] and err.count("\n") == 1
    assert f"sae_accel: '{NAME}': the Hub cannot be reached" in err and "these are the 1 heads" in err
    assert heads["layers.1"].num_latents == 96
    line = _line(convert, NAME, tmp_path / "out", "sparsify")
    assert "may have heads that are not in the cache" in line and "--include: layers.1" in line
    assert not (tmp_path / "out").exists()
    assert len(convert(NAME, tmp_path / "out", "sparsify", ["layers.1"])) == 1
    assert "is not in the cache, and the Hub cannot be reached" in _line(AutoSae.open, "user/none")


def _changed(hub, name: str) -> bytes:
    """The weights of a head, with other numbers."""
    weights = load(hub.files(NAME)[f"{name}/model.safetensors"])
    return save({key: tensor + 1 for key, tensor in weights.items()}, metadata={"format": "pt"})


def test_a_mapping_a_conversion_and_heads_to_start_from_are_of_the_commit_that_was_listed(hub, released, tmp_path):
    expected = _weights(tmp_path / "before")
    first = hub.commits(NAME)[-1][0]
    heads, to_start = AutoSae.open(NAME), open_pretrained(NAME)
    assert torch.equal(heads["layers.1"].W_dec, expected["layers.1"])
    changes = {f"{name}/model.safetensors": File(_changed(hub, name), lfs=True) for name in expected}
    hub.repo(NAME).commit("main", "Another", changes, [], None)
    assert torch.equal(heads["layers.2"].W_dec, expected["layers.2"]) and heads.commit == first
    assert torch.equal(to_start["layers.2"].W_dec, expected["layers.2"])
    newest = _weights(tmp_path / "after")
    assert not any(torch.equal(newest[name], expected[name]) for name in newest)
    at_first = open_pretrained(f"{NAME}@{first}")
    assert torch.equal(at_first["layers.1"].W_dec, expected["layers.1"])


def test_a_file_that_is_not_as_the_hub_says_is_fetched_again_or_refused(hub, released, tmp_path):
    expected = _weights(tmp_path / "before")
    for name, lie in (("model.safetensors", _changed(hub, "layers.1")), ("config.json", b" " * 40)):
        path = f"layers.1/{name}"
        size = len(hub.files(NAME)[path])
        wrong = lie[:size].ljust(size)
        hub.lie(path, wrong)
        cache = tmp_path / f"once-{name}"
        assert torch.equal(AutoSae.open(NAME, cache_dir=cache).load("layers.1").W_dec, expected["layers.1"])
        hub.lie(path, wrong, times=2)
        cache = tmp_path / f"twice-{name}"
        line = _line(AutoSae.open(NAME, cache_dir=cache).load, "layers.1")
        assert f"{path} arrived twice with another content than the Hub's checksum is of" in line
        assert torch.equal(AutoSae.open(NAME, cache_dir=cache).load("layers.1").W_dec, expected["layers.1"])


PAGE = b"<!DOCTYPE html><html><body><h1>Please log in</h1></body></html>"


@pytest.mark.parametrize(
    "body", [PAGE, b"", b"{}", b"[]", b"null", b'{"sha": 3}', b'"x"', b"[[1]]", b'[{"type": "file"}]']
)
@pytest.mark.parametrize("path", [f"/api/models/{NAME}", "/tree/"])
def test_what_answers_in_the_hubs_place_is_told_in_a_clause(hub, released, path, body, tmp_path):
    hub.lie(path, body, times=50)
    try:
        heads = AutoSae.open(NAME)
    except InputError as error:
        line = str(error)
        assert "\n" not in line and "<" not in line and "Expecting value" not in line
        return
    # An empty listing is one.
    assert len(heads)


@pytest.mark.parametrize("path", ["/api/repos/create", "/auth-check/", "/tree/", "/commit/", "/preupload/", "/batch"])
def test_what_answers_in_the_hubs_place_to_a_push_is_told_in_a_clause(hub, released, path, capsys):
    hub.lie(path, PAGE, times=50, method=None)
    assert push.main([str(released), "user/other"]) in (0, 2)
    # Beside bars.
    said = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line]
    assert len(said) <= 1 and not any(words in line for line in said for words in ("<", "Expecting value"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 418, 451, 501, 505])
def test_a_refusal_is_a_clause_whatever_page_comes_with_it(hub, released, status):
    hub.fail(None, f"/api/models/{NAME}", status, times=50, body=PAGE)
    line = _line(AutoSae.open, NAME)
    assert line.startswith(f"'{NAME}' cannot be read: ") and "<" not in line and len(line) < 250


def test_a_private_repo_says_which_argument_takes_a_token(hub, released, place, tmp_path, capsys):
    (hub.root / "user").mkdir(parents=True, exist_ok=True)
    os.symlink(released, hub.root / "user" / "closed")
    hub.token = None
    assert _line(AutoSae.open, "user/closed").endswith("Run `hf auth login`, set HF_TOKEN, or give token.")
    assert len(AutoSae.open("user/closed", token="secret")) == 2
    words = command_words(place, tmp_path, **{"training.init_from": "user/closed", "training.max_steps": 1})
    assert train.main(words) == 2
    assert capsys.readouterr().err.endswith("Set --model.token, or run `hf auth login`.\n")
    assert train.main([*words, "--model.token", "secret", "--heads.k", "4"]) == 0
    assert "secret" not in "".join(path.read_text(errors="ignore") for path in (tmp_path / "run").rglob("*.[jmy]*"))


def test_a_commit_of_somebody_else_to_a_repo_that_was_free_is_said(hub, trained, tmp_path):
    trainer = tiny_trainer(tmp_path / "saes", max_steps=1, push_to_hub=True, hub_strategy="end")
    hub.repo(NAME).commit("main", "Add weights", {"pytorch_model.bin": File(b"x")}, [], None)
    line = _line(trainer.train)
    assert f"'{NAME}' was free when this run began, but somebody else has committed to it" in line
    assert "'Add weights'" in line and "is taken" not in line


def test_the_last_push_ends_in_time_with_how_to_push_by_hand(hub, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path / "saes", max_steps=2, save_steps=1, push_to_hub=True, hub_timeout=0.7)
    hub.stall("/commit/", times=100)
    began = time.monotonic()
    line = _line(trainer.train)
    assert time.monotonic() - began < 60 and "training.hub_timeout = 0.7 s" in line
    assert f"To push them: python -m sae_accel.push {tmp_path / 'saes'} {NAME}" in line
    assert len(AutoSae.open(tmp_path / "saes")) == 2


@pytest.mark.parametrize("what", ["push", "train"])
def test_ctrl_c_ends_a_wait_for_the_hub(hub, trained, place, tmp_path, what):
    hub.stall("/api/", times=100)
    words = {
        "push": [trained, "user/other"],
        "train": command_words(place, tmp_path, **{"training.init_from": NAME}),
    }
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    fixed = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"sae_accel.{what}", *map(str, words[what])]
    with subprocess.Popen(command, env=kept | fixed, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not hub.requests and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and err.splitlines()[-1].startswith("sae_accel: Stopped by SIGINT.")


def test_ctrl_c_does_not_wait_for_a_push_that_the_hub_does_not_answer(hub, tmp_path, caplog):
    class Interrupts(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = tiny_trainer(tmp_path / "saes", max_steps=20, save_steps=1, push_to_hub=True)
    trainer.add_callback(Interrupts())
    hub.stall("/commit/", times=100)
    with pytest.raises(KeyboardInterrupt, match="Saved .*checkpoint-"):
        trainer.train()
    (warned,) = [record.getMessage() for record in caplog.records if "did not arrive" in record.getMessage()]
    assert "the Hub has not answered" in warned and f"python -m sae_accel.push CHECKPOINT_FOLDER {NAME}" in warned


def test_tokens_reach_the_hub_alone(hub, place, tmp_path, capfd):
    hub.token, hub.users["hf_" + "a" * 30] = "hf_" + "a" * 30, "user"
    secrets = [hub.token, "hf_" + "b" * 30, "hf_" + "c" * 30]
    changes = {"model.token": secrets[1], "data.load_args.token": secrets[2], "training.push_to_hub": "true"}
    changes |= {"training.report_to": "tensorboard", "training.hub_strategy": "checkpoint", "training.save_steps": 1}
    assert train.main(command_words(place, tmp_path, **changes)) == 0
    # And a run that fails in a way that nobody has foreseen, with a report.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_accel.training.trainer.SaeTrainer.train", lambda self: 1 / 0)
        words = command_words(place, tmp_path, **changes | {"training.overwrite_output_dir": "true"})
        assert train.main(words) == 1
    written = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and hub.root not in path.parents
    )
    sent = b"".join(hub.files("user/run").values())
    said = "".join(capfd.readouterr())
    assert "is a defect" in said and b"ZeroDivisionError" in written and len(sent) > 10_000
    for secret in secrets:
        assert secret.encode() not in written and secret.encode() not in sent and secret not in said
    # Storage of large files is another host.
    uploads = [
        headers for line, headers in zip(hub.requests, hub.headers, strict=True) if line.startswith("PUT /lfs/")
    ]
    assert uploads and not any("authorization" in headers for headers in uploads)

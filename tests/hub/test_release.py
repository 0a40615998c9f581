"""Releases and what is loaded from them, with the Hub's own client and a server on loopback."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hub_repos import read_folder
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny import command_words, forbid_loading, tiny_trainer
from transformers import TrainerCallback

from sae_accel import push, train
from sae_accel.common.errors import InputError
from sae_accel.common.hub_requests import TRIES
from sae_accel.hub.publisher import hub_repo
from sae_accel.hub.release import Release
from sae_accel.loading.auto import AutoSae
from sae_accel.loading.convert import convert


# The client gives httpx files to upload in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[2]
HEADS = [f"layers.{i}/{name}" for i in (1, 2) for name in ("config.json", "model.safetensors")]
REPORT = ["latent_frequency.safetensors", "log_history.jsonl", "metrics.json", "recipe.yaml", "trainer_state.json"]
ONE_HEAD = ["README.md", "config.json", "model.safetensors"]
RELEASE = sorted(["README.md", *HEADS, *REPORT, "plots/firing_frequency.png", "plots/fvu.png"])
# A commit to a repo that no client makes.
OTHER = ("main", "Other", {}, [], None)
ACTIVATIONS = torch.linspace(-1, 1, 5 * 24).view(5, 24)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub of this process, with an empty cache and no waits. Its `token` is that of the stored login."""
    options = dict(users={"secret": "user", "other": "someone"}, gated=("someone/gated",), private=("user/closed",))
    with HubServer(tmp_path / "hub", **options) as hub:
        for name, value in (hub.settings(tmp_path / "cache") | {"DOWNLOAD_CHUNK_SIZE": 1000}).items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic, time=time.time)
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
        monkeypatch.setattr("sae_accel.common.hub_requests.time", clock)
        hub.token = "secret"
        monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: hub.token)
        monkeypatch.setattr("huggingface_hub.utils._headers.detect_agent", lambda: None)
        yield hub


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A run's folder, which no test changes."""
    folder = tmp_path_factory.mktemp("trained")
    assert train.main(command_words(place, folder)) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _push(*words: object) -> int:
    return push.main([str(word) for word in words])


def _refused(capsys, *words: object) -> str:
    """The one line of a push that is refused."""
    capsys.readouterr()
    assert _push(*words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("sae_accel: ") and err.count("\n") == 1, err
    return err


def _messages(hub, repo: str, revision: str = "main") -> list[str]:
    return [message for _, message, _ in hub.commits(repo, revision)[1:]]


def _changed(hub, repo: str) -> list[str]:
    """What the last commit changed."""
    return hub.commits(repo)[-1][2]


def _uploads(hub) -> list[str]:
    """The digests of the large files that clients have begun to send."""
    return [line.split("/")[-1] for line in hub.requests if line.startswith("PUT /lfs/")]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _change(path: Path) -> None:
    weights = load_file(path)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path, metadata={"format": "pt"})


def _line(call, *arguments: object, **options: object) -> str:
    """The message of an `InputError`, which has to be one line."""
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def _fresh(words: list[object], home: Path, hub: HubServer, **environment: str) -> subprocess.CompletedProcess:
    """A process that has the client's settings from its environment, as a user's has, and a cache of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    fixed = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    command, environment = [sys.executable, *map(str, words)], kept | fixed | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_run_is_released_and_read_back_bit_for_bit_by_another_machine(place, tmp_path):
    words = command_words(place, tmp_path, **{"training.push_to_hub": "true", "training.hub_model_id": "saes"})
    with HubServer(tmp_path / "hub") as hub:
        # Of three pushes the first fails.
        hub.fail("POST", "/commit/", status=403)
        more = ["--training.save_steps", "15", "--training.max_steps", "45"]
        done = _fresh(["-m", "sae_accel.train", *words, *more], tmp_path / "home", hub, HF_TOKEN="secret")
        assert done.returncode == 0, done.stderr
        warned = [line for line in done.stderr.splitlines() if "was not pushed" in line]
        assert len(warned) == 1 and "Step 15 was not pushed: 'user/saes' cannot" in warned[0]
        assert "403" in warned[0] and "Traceback" not in done.stderr and warned[0].endswith("Training goes on.")
        assert _messages(hub, "user/saes")[-1] == "End of training"
        assert sorted(hub.files("user/saes")) == sorted([".gitattributes", *RELEASE])
        code = f"""
import torch
from sae_accel import AutoSae
here, there = AutoSae.from_pretrained({str(tmp_path / "run")!r}), AutoSae.from_pretrained("user/saes")
x = torch.randn(5, 24)
for name, head in there.items():
    a, b = head.state_dict(), here[name].state_dict()
    same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
    print(name, same, torch.equal(head(x).reconstruction, here[name](x).reconstruction))
"""
        loaded = _fresh(["-c", code], tmp_path / "elsewhere", hub)
        assert loaded.stdout == "layers.1 True True\nlayers.2 True True\n", loaded.stderr
        refused = _fresh(["-m", "sae_accel.push", tmp_path / "run", "user/saes"], tmp_path / "elsewhere", hub)
        assert refused.returncode == 2 and "hf auth login" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_release_is_one_commit_of_heads_and_report_alone_and_is_sent_once(hub, run, capsys):
    assert _push(run, "user/saes") == 0
    oid, message, changed = hub.commits("user/saes")[1]
    assert capsys.readouterr().out == f"Pushed: {hub.url}/user/saes, commit {oid[:8]}.\n"
    assert (message, changed) == ("Upload heads", RELEASE) and len(hub.commits("user/saes")) == 2
    files = hub.files("user/saes")
    assert all(files[name] == (run / name).read_bytes() for name in HEADS + REPORT)
    assert 'AutoSae.from_pretrained("user/saes")' in files["README.md"].decode()
    assert str(run) not in files["README.md"].decode().split("Recipe")[0]
    hub.requests.clear()
    assert _push(run, "saes") == 0
    assert capsys.readouterr().out == f"There was nothing new to push: {hub.url}/user/saes, commit {oid[:8]}.\n"
    assert len(hub.commits("user/saes")) == 2 and not _uploads(hub)
    _change(run / "layers.1" / "model.safetensors")
    assert _push(run, "user/saes", "--message", "Better") == 0
    assert hub.commits("user/saes")[2][1:] == ("Better", ["layers.1/model.safetensors"])
    assert _uploads(hub) == [_digest(run / "layers.1" / "model.safetensors")]
    assert _push(run, "user/saes", "--license", "mit") == 0
    assert _changed(hub, "user/saes") == ["README.md"]
    assert "license: mit" in hub.files("user/saes")["README.md"].decode()
    capsys.readouterr()
    assert _push(run, "user/saes", "--include", "layers.2") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Older heads stay in the repo, but its new card does not name them: layers.1."
    ]
    assert set(HEADS) < set(hub.files("user/saes")) and "layers.1 " not in hub.files("user/saes")["README.md"].decode()


def test_a_push_that_is_cut_off_changes_nothing_and_goes_on_when_run_again(hub, run, capsys):
    lost = _digest(run / "layers.2" / "model.safetensors")
    hub.cut(f"/lfs/user/saes/{lost}", after=5_000, times=100)
    assert _push(run, "user/saes") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("sae_accel: 'user/saes' cannot be pushed to: Error while uploading 'layers.2/model.safe")
    assert "disconnected" in line and line.endswith("Push again to go on: no file that has arrived is sent twice.")
    assert not _messages(hub, "user/saes") and list(hub.files("user/saes")) == [".gitattributes"]
    arrived = set(hub.repo("user/saes").objects)
    assert len(arrived) >= 2 and lost not in arrived
    hub.mend()
    hub.requests.clear()
    hub.fail("POST", "/repos/create", status=429, times=TRIES)
    assert "answered 429. Push again" in _refused(capsys, run, "user/saes")
    hub.fail("POST", "/commit/", status=503, times=TRIES)
    assert "503" in _refused(capsys, run, "user/saes")
    assert lost in _uploads(hub) and not arrived & set(_uploads(hub)) and not _messages(hub, "user/saes")
    hub.requests.clear()
    # What arrives although its answer does not is there.
    hub.cut("/commit/", answer=True)
    assert _push(run, "user/saes") == 0 and len(_messages(hub, "user/saes")) == 1
    assert f"commit {hub.commits('user/saes')[-1][0][:8]}" in capsys.readouterr().out
    assert _push(run, "user/saes") == 0 and not _uploads(hub) and len(_messages(hub, "user/saes")) == 1
    assert "nothing new" in capsys.readouterr().out and _changed(hub, "user/saes") == RELEASE


def test_ctrl_c_ends_a_push_with_one_line(hub, run, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", Mock(side_effect=KeyboardInterrupt))
    assert _push(run, "user/saes") == 130
    assert capsys.readouterr().err.startswith("sae_accel: Stopped.") and not _messages(hub, "user/saes")


def test_a_dry_run_lists_what_a_push_then_sends_and_asks_for_nothing(hub, run, capsys):
    hub.token = None
    assert _push(run, "user/saes", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert not hub.requests and not err and "Nothing was sent" in out
    listed = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:-2]}
    hub.token = "secret"
    assert _push(run, "user/saes") == 0
    sent = {name: f"{len(content):,}" for name, content in hub.files("user/saes").items() if name != ".gitattributes"}
    assert listed == sent and listed["layers.1/model.safetensors"] == "19,232"


def test_one_head_a_branch_and_a_private_repo(hub, run, capsys):
    assert _push(run, "user/one", "--include", "layers.1", "--private") == 0
    names = [name for name in hub.files("user/one") if name.startswith("layers")]
    card = hub.files("user/one")["README.md"].decode()
    assert names == HEADS[:2] and "layers.1" in card and "layers.2" not in card.split("Recipe")[0]
    assert hub.repo("user/one").private and AutoSae.from_pretrained("user/one").config.hookpoint == "layers.1"
    hub.token = None
    assert "user/one is restricted" in _line(AutoSae.open, "user/one")
    assert "Invalid credentials" in _line(AutoSae.open, "user/one", token="wrong")
    assert len(AutoSae.open("user/one", token="secret")) == 1
    hub.token = "secret"
    before = hub.files("user/one")
    _change(run / "layers.1" / "model.safetensors")
    for _ in range(2):
        assert _push(run, "user/one", "--revision", "wip/b") == 0
    assert hub.files("user/one") == before and _messages(hub, "user/one", "wip/b") == ["Upload heads"] * 2
    assert list(AutoSae.open("user/one", revision="wip/b")) == ["layers.1", "layers.2"]
    head = AutoSae.from_pretrained("user/one", hookpoint="layers.1", revision="wip/b")
    assert torch.equal(head.W_dec, AutoSae.from_pretrained("user/one").W_dec + 1)
    assert "Invalid rev id: none" in _line(AutoSae.open, "user/one", revision="none")


@pytest.mark.parametrize(
    ("token", "words", "says"),
    [
        (None, ["user/new"], "hf auth login"),
        ("wrong", ["user/new"], "Invalid credentials in Authorization header. Run `hf auth login`"),
        ("secret", ["someone/new"], 'rights to create a model under the namespace "someone"'),
        ("secret", ["someone/open"], "don't have write access"),
        ("secret", ["someone/gated"], "'someone/gated' cannot be pushed to: the token does not allow it (status 403)"),
        ("other", ["user/closed"], "'user/closed' cannot be pushed to: the token does not allow it (status 403)"),
        ("secret", ["user/lm"], "'user/lm' is taken: it holds config.json, pytorch_model.bin and no head of"),
        ("secret", ["user/a/b"], "'repo_name' or 'namespace/repo_name': 'user/a/b'"),
        ("secret", ["user/two words"], "alphanumeric"),
        ("secret", ["user/new", "--include", "layer.1"], "'layer.1' matches. Near names: layers.1, layers.2."),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_one_line_and_nothing_written(hub, run, capsys, token, words, says):
    kept = {"someone/open": "README.md", "someone/gated": "README.md", "user/closed": "README.md"}
    for repo, name in [*kept.items(), ("user/lm", "pytorch_model.bin"), ("user/lm", "config.json")]:
        (hub.root / repo).mkdir(parents=True, exist_ok=True)
        (hub.root / repo / name).write_text("{}")
    hub.token = token
    line = _refused(capsys, run, *words)
    assert says in line and "Push again" not in line and "mozilla" not in line
    assert not any("preupload" in line or "PUT" in line or "/branch/" in line for line in hub.requests)
    assert all(len(hub.commits(repo)) == 1 for repo in [*kept, "user/lm"])
    with pytest.raises(Exception, match="not found"):
        hub.repo("user/new")


def test_folders_without_heads_of_ours_are_refused_before_anything_is_asked(hub, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no SAE or transcoder" in _refused(capsys, tmp_path / "empty", "user/new")
    assert "There is no folder" in _refused(capsys, tmp_path / "nowhere", "user/new")
    convert(str(run), tmp_path / "theirs", "sparsify")
    assert "another library's layout" in _refused(capsys, tmp_path / "theirs", "user/new")
    (run / "log_history.jsonl").write_text("3")
    assert "line 1, but must hold a mapping" in _refused(capsys, run, "user/new")
    assert not hub.requests


def test_a_head_and_a_mapping_in_any_layout_are_released_in_ours(hub, run, tmp_path):
    convert(str(run), tmp_path / "theirs", "sparsify")
    own, theirs = AutoSae.from_pretrained(run), AutoSae.from_pretrained(tmp_path / "theirs")
    pushed = own["layers.2"].push_to_hub("one", license="mit", message="One")
    assert pushed.is_new and pushed.url == f"{hub.url}/user/one" and pushed.commit == hub.commits("user/one")[-1][0]
    assert _messages(hub, "user/one") == ["One"] and _changed(hub, "user/one") == ONE_HEAD
    assert "license: mit" in hub.files("user/one")["README.md"].decode()
    assert not own["layers.2"].push_to_hub("one", license="mit").is_new
    theirs.push_to_hub("user/many", private=True, token="secret")
    assert _changed(hub, "user/many") == ["README.md", *HEADS] and hub.repo("user/many").private
    theirs.select("layers.1").push_to_hub("user/many", revision="first")
    assert len(hub.files("user/many", "first")) == len(hub.files("user/many"))
    one, many = AutoSae.from_pretrained("user/one"), AutoSae.from_pretrained("user/many")
    for found, name in ((one, "layers.2"), (many["layers.1"], "layers.1"), (many["layers.2"], "layers.2")):
        assert found.config.hookpoint == name
        assert torch.equal(found(ACTIVATIONS).reconstruction, own[name](ACTIVATIONS).reconstruction)
    assert all("hf auth login" in _line(heads.push_to_hub, "user/one", token="wrong") for heads in (one, own))


class Calls(TrainerCallback):
    """Calls `when[event]` as the event comes."""

    def __init__(self, **when: Callable[[], object]):
        for event, call in when.items():
            setattr(self, event, lambda *arguments, call=call, **options: call() and None)


def _trainer(folder: Path, **options: object):
    """One that lets each push arrive before training goes on, so that none is left out."""
    trainer = tiny_trainer(folder, **dict(max_steps=4, save_steps=2, push_to_hub=True) | options)
    trainer.add_callback(Calls(on_save=trainer.publisher.finish))
    return trainer


def test_a_push_that_is_at_work_is_not_waited_for_but_at_the_end(hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "saes", max_steps=4, save_steps=1, push_to_hub=True)
    lock = hub.repo("user/saes").lock
    trainer.add_callback(Calls(on_train_begin=lock.acquire, on_train_end=lock.release))
    trainer.train()
    assert _messages(hub, "user/saes") == ["Training in progress, step 1", "End of training"]


@pytest.mark.parametrize("last", [3, 20])
def test_the_checkpoint_of_an_interruption_arrives_even_if_a_push_was_at_work_or_it_is_the_last(hub, tmp_path, last):
    trainer = tiny_trainer(tmp_path / "saes", max_steps=last, save_steps=1, push_to_hub=True)
    lock = hub.repo("user/saes").lock

    def at_third(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: call() if trainer.state.global_step == 3 else None

    interrupt = at_third(lambda: os.kill(os.getpid(), signal.SIGINT))
    trainer.add_callback(Calls(on_train_begin=lock.acquire, on_step_end=interrupt, on_save=at_third(lock.release)))
    with pytest.raises(KeyboardInterrupt, match="Stopped after step 3"):
        trainer.train()
    assert _messages(hub, "user/saes") == ["Training in progress, step 1", "Training in progress, step 3"]


@pytest.mark.parametrize(
    ("strategy", "steps", "checkpoints"),
    [
        ("end", [], []),
        ("every_save", [2], []),
        ("checkpoint", [2, 4], ["last-checkpoint"]),
        ("all_checkpoints", [2, 4], ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_strategies_say_what_is_pushed_when(hub, tmp_path, strategy, steps, checkpoints):
    _trainer(tmp_path / "saes", hub_strategy=strategy, hub_private_repo=True).train()
    during = [f"Training in progress, step {step}" for step in steps]
    assert _messages(hub, "user/saes") == [*during, "End of training"] and hub.repo("user/saes").private
    files = hub.files("user/saes")
    assert sorted({name.split("/")[0] for name in files if "checkpoint" in name}) == checkpoints
    for name in checkpoints:
        local = tmp_path / "saes" / name.replace("last-checkpoint", "checkpoint-4")
        here = {f"{name}/{path}": content for path, content in read_folder(local).items()}
        assert here and here == {path: content for path, content in files.items() if path.startswith(f"{name}/")}
    assert checkpoints or not any(name.endswith((".pt", ".bin", ".pkl")) for name in files)
    assert list(AutoSae.open("user/saes")) == ["layers.1", "layers.2"]
    assert files["layers.1/model.safetensors"] == (tmp_path / "saes" / "layers.1" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "saes").glob(".*"))


def test_a_push_that_fails_is_one_warning_and_the_same_trainer_may_go_on(hub, tmp_path, caplog, monkeypatch):
    # On file systems without links a checkpoint is copied.
    monkeypatch.setattr("os.link", Mock(side_effect=PermissionError("no links")))
    trainer = _trainer(tmp_path / "saes", save_steps=1)
    hub.fail("POST", "/commit/", status=500, times=TRIES)
    trainer.train()
    warned = [record.getMessage() for record in caplog.records if "was not pushed" in record.getMessage()]
    assert len(warned) == 1 and "Step 1 was not pushed: " in warned[0] and "Push again" not in warned[0]
    assert _messages(hub, "user/saes") == [f"Training in progress, step {i}" for i in (2, 3)] + ["End of training"]
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=True)
    assert _messages(hub, "user/saes")[3:] == ["Training in progress, step 5", "End of training"]
    _change(tmp_path / "saes" / "layers.1" / "model.safetensors")
    assert (
        trainer.push_to_hub("Once more", revision="more").is_new
        and _messages(hub, "user/saes", "more")[-1] == "Once more"
    )


def test_a_last_push_that_fails_comes_after_the_table_with_a_run_that_is_whole(hub, place, tmp_path, capsys):
    words = command_words(place, tmp_path, **{"training.push_to_hub": "true", "training.hub_strategy": "end"})
    hub.fail("POST", "/run/commit/", status=500, times=TRIES)
    assert train.main(words) == 2
    out, err = capsys.readouterr()
    assert "layers.2  sae" in out and "Saved in" in out
    assert err.splitlines()[-1].startswith("sae_accel: 'user/run' cannot be pushed to: ") and "Traceback" not in err
    assert len(AutoSae.from_pretrained(tmp_path / "run")) == 2 and (tmp_path / "run" / "README.md").is_file()
    assert _push(tmp_path / "run", "user/run") == 0 and _changed(hub, "user/run") == RELEASE


def test_a_run_that_could_not_push_is_refused_before_the_lm_is_loaded(hub, place, tmp_path, capsys, monkeypatch):
    forbid_loading(monkeypatch)
    (hub.root / "user" / "lm").mkdir(parents=True)
    (hub.root / "user" / "lm" / "pytorch_model.bin").write_text("")
    refusals = ((None, "saes", "hf auth"), ("wrong", "saes", "Invalid"), ("secret", "other/saes", "namespace"))
    for hub.token, repo, says in (*refusals, ("secret", "user/lm", "is taken")):
        words = command_words(place, tmp_path, **{"training.push_to_hub": "true", "training.hub_model_id": repo})
        assert train.main(words) == 2
        err = capsys.readouterr().err
        assert says in err and err.startswith("sae_accel: ") and err.count("\n") == 1
        assert not (tmp_path / "run").exists() and not _uploads(hub)


def test_weights_that_were_replaced_are_deleted_with_what_told_of_them(hub, run, tmp_path):
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"LoRA")
    Release(run, "user/saes").push()
    assert "adapter/adapter_model.safetensors" in hub.files("user/saes")
    # What a checkpoint holds is another's, and stays.
    kept = "last-checkpoint/adapter/adapter_model.safetensors"
    Release(run, "user/saes").push(extra={kept: run / "adapter" / "adapter_model.safetensors"})
    shutil.rmtree(run / "adapter")
    heads = AutoSae.open(run)
    sharded = tmp_path / "sharded"
    for name in heads:
        heads[name].save_pretrained(sharded / name, max_shard_size="10KB")
    heads["layers.1"].save_pretrained(tmp_path / "one" / "layers.1", max_shard_size="10KB")
    pushed = Release(tmp_path / "one", "user/saes").push()
    files = hub.files("user/saes")
    assert pushed.left == ("layers.2",) and set(REPORT) < set(files) and "plots/fvu.png" in files
    assert "layers.1/model.safetensors" not in files and "layers.1/model.safetensors.index.json" in files
    assert HEADS[-1] in files and not Release(tmp_path / "one", "user/saes").push().is_new
    Release(sharded, "user/saes").push()
    here = {name for name in read_folder(sharded) if "layers" in name}
    assert set(hub.files("user/saes")) == {".gitattributes", "README.md", kept, *here}
    Release(run, "user/saes").push()
    assert set(hub.files("user/saes")) == {".gitattributes", kept, *RELEASE} and len(hub.commits("user/saes")) == 6


def test_a_repo_is_ours_if_what_looks_like_a_head_is_one_by_its_config(hub, run):
    for name in ("text_encoder/config.json", "text_encoder/model.safetensors", "unet/config.json", "model_index.json"):
        (hub.root / "user" / "pipe" / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.root / "user" / "pipe" / name).write_text('{"model_type": "clip_text_model"}')
    assert "'user/pipe' is taken: it holds model_index.json, " in _line(Release(run, "user/pipe").push)
    assert len(hub.commits("user/pipe")) == 1
    shutil.copytree(hub.root / "user" / "pipe", hub.root / "user" / "both")
    shutil.copytree(run / "layers.1", hub.root / "user" / "both" / "z")
    assert Release(run, "user/both").push().left == ("text_encoder", "z")


def test_a_card_that_somebody_wrote_on_the_hub_stays_and_that_is_said(hub, run, capsys):
    for repo, text in (("notes", "# Mine\n"), ("licensed", "---\nlicense: mit\n---\n"), ("empty", "")):
        (hub.root / "user" / repo).mkdir(parents=True)
        (hub.root / "user" / repo / "README.md").write_text(text)
        assert _push(run, f"user/{repo}") == 0
        left = repo == "notes"
        assert ("README.md stays, since a person wrote it" in capsys.readouterr().out) == left
        assert (hub.files(f"user/{repo}")["README.md"] == text.encode()) == left
        assert set(RELEASE) <= set(hub.files(f"user/{repo}"))
    assert _push(run, "user/notes") == 0 and "nothing new" in capsys.readouterr().out
    # One beside the heads is meant to be sent.
    (run / "README.md").write_text("# Here\n")
    assert _push(run, "user/notes") == 0 and hub.files("user/notes")["README.md"] == b"# Here\n"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("short", "Head 'layers.2' of '.*' cannot be loaded, because its weights are damaged"),
        ("shard", "Head 'layers.2' of '.*' cannot be loaded: .* which its weights lack"),
        ("none", "Head 'layers.2' of '.*' has a config.json but no weights"),
        ("config", "Head 'layers.2' of '.*' cannot be loaded: .*shape"),
    ],
)
def test_damaged_heads_are_refused_by_name_before_anything_is_asked(hub, run, capsys, damage, says):
    head, weights = AutoSae.open(run)["layers.2"], run / "layers.2" / "model.safetensors"
    if damage == "short":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage in ("shard", "none"):
        weights.unlink()
    if damage == "shard":
        head.save_pretrained(run / "layers.2", max_shard_size="10KB")
        next((run / "layers.2").glob("model-*")).unlink()
    if damage == "config":
        head.config.num_latents = 97
        head.config.save_pretrained(run / "layers.2")
    assert re.search(says, _refused(capsys, run, "user/saes"), re.IGNORECASE) and not hub.requests
    assert _push(run, "user/saes", "--include", "layers.1") == 0


def test_the_card_says_how_to_load_what_is_not_all_of_the_repo_or_on_a_branch(hub, run, capsys):
    assert _push(run, "user/saes", "--include", "layers.1", "--revision", "v1") == 0
    size = f"{len(hub.files('user/saes', 'v1')['README.md']):,}"
    assert _push(run, "user/saes", "--include", "layers.1", "--revision", "v1", "--dry-run") == 0
    assert re.search(rf"README.md +{size}\n", capsys.readouterr().out)
    assert _push(run, "user/saes", "--include", "layers.2", "--revision", "v1") == 0
    card = hub.files("user/saes", "v1")["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'AutoSae.from_pretrained("user/saes", hookpoint="layers.2", revision="v1")' in code
    names: dict = {}
    exec(code, names)
    assert names["head"].config.hookpoint == "layers.2"
    AutoSae.open(run)["layers.1"].push_to_hub("user/top")
    capsys.readouterr()
    assert _push(run, "user/top") == 0
    assert "does not name them: the one at the top.\n" in capsys.readouterr().out


def test_a_push_whose_reader_has_gone_says_what_was_sent(run):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "sae_accel.push", run, "user/saes", "--dry-run"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "sae_accel: Stopped by a closed pipe. Nothing was sent.\n")


def test_refusals_say_what_would_help(hub, run, tmp_path, capsys, monkeypatch):
    assert "The folder's name is empty" in _refused(capsys, "", "user/saes")
    line = _line(hub_repo, SimpleNamespace(hub_model_id=None, output_dir=tmp_path / "my run"))
    assert "'my run'" in line and "training.hub_model_id" in line
    # Somebody's commit comes between.
    monkeypatch.setattr(
        "sae_accel.hub.release.outdated_files", lambda *_, **__: hub.repo("user/saes").commit(*OTHER) and []
    )
    assert "A commit has happened since" in (line := _refused(capsys, run, "user/saes")) and "Push again" in line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = _refused(capsys, run, "user/saes")
    assert line.endswith("Unset HF_HUB_OFFLINE.\n") and "Push again" not in line


def _fetched(hub) -> set[str]:
    return {re.split("/resolve/[0-9a-f]*/", line)[-1] for line in hub.requests if "/resolve/" in line}


def test_only_what_is_asked_for_is_fetched_into_the_cache_that_serves_offline(hub, run, tmp_path, monkeypatch):
    Release(run, "user/saes").push()
    hub.requests.clear()
    heads = AutoSae.from_pretrained("user/saes", cache_dir=tmp_path / "mine").select("*.[2-9]")
    assert list(heads) == ["layers.2"] and not _fetched(hub)
    expected = heads["layers.2"].W_dec
    assert _fetched(hub) == set(HEADS[2:]) and not (tmp_path / "cache").exists()
    everything = AutoSae.open("user/saes")
    assert "has no head 'layers.3'. Near names: layers.2, layers.1." in _line(everything.load, "layers.3")
    assert "no head that 'h.*' matches" in _line(everything.select, "h.*")
    hub.requests.clear()
    there = dict(hookpoint="layers.2", cache_dir=tmp_path / "mine")
    assert torch.equal(AutoSae.from_pretrained("user/saes", local_files_only=True, **there).W_dec, expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(AutoSae.from_pretrained("user/saes", **there).W_dec, expected)
    assert "is not in the cache" in _line(AutoSae.open, "user/other")
    assert not hub.requests


@pytest.mark.parametrize("status", [429, 503])
def test_busy_answers_are_tried_again_or_told_and_a_download_that_was_cut_goes_on(hub, run, tmp_path, status):
    Release(run, "user/saes").push()
    hub.fail("GET", "/tree/", status, times=2)
    hub.fail("HEAD", "/resolve/", status)
    hub.cut("layers.1/model.safetensors", after=7_500, times=2)
    hub.cut("layers.1/config.json", after=50, resets=True)
    head = AutoSae.from_pretrained("user/saes", hookpoint="layers.1")
    assert torch.equal(head.W_dec, AutoSae.from_pretrained(run)["layers.1"].W_dec)
    assert [headers["range"] for headers in hub.headers if "range" in headers] == ["bytes=7000-", "bytes=14000-"]
    hub.fail("GET", "/api/models/user/saes", status, times=TRIES)
    line = _line(AutoSae.open, "user/saes")
    assert line.startswith("'user/saes' cannot be read: the Hub was asked for GET /api/models/user/saes, and it answ")
    assert str(status) in line and list(AutoSae.open("user/saes")) == ["layers.1", "layers.2"]
    hub.fail(None, "/resolve/", status, times=100)
    heads = AutoSae.open("user/saes", cache_dir=tmp_path / "empty")
    assert _line(heads.load, "layers.1").startswith("'user/saes' cannot be read: ")


def test_a_download_that_is_cut_again_and_again_is_one_line(hub, run):
    Release(run, "user/saes").push()
    hub.cut("layers.1/model.safetensors", after=700, times=100)
    assert "'user/saes' cannot be read" in _line(AutoSae.open("user/saes").load, "layers.1")


def test_broken_files_and_repos_without_heads_are_told_in_one_line(hub, run):
    weights = (run / "layers.1" / "model.safetensors").read_bytes()
    broken = {"short": weights[:5_000], "changed": weights[:20] + bytes(9) + weights[29:], "empty": b""}
    for name, content in broken.items():
        shutil.copytree(run / "layers.1", hub.root / "user" / name)
        (hub.root / "user" / name / "model.safetensors").write_bytes(content)
        line = _line(AutoSae.from_pretrained, f"user/{name}")
        assert line.startswith(f"'user/{name}' cannot be loaded, because its weights are") and "header" in line
    other = shutil.copytree(run / "layers.1", hub.root / "user" / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_latents": 97}))
    assert _line(AutoSae.from_pretrained, "user/other").startswith("'user/other' cannot be loaded: ")
    (hub.root / "someone" / "gated").mkdir(parents=True)
    shutil.copytree(run / "plots", hub.root / "user" / "data")
    assert "you are not in the authorized list" in _line(AutoSae.open, "someone/gated")
    hub.token = None
    assert "You must have access to it" in _line(AutoSae.open, "someone/gated")
    hub.token = "secret"
    assert "'user/data' holds no SAE or transcoder" in _line(AutoSae.open, "user/data")
    assert "'user/none' cannot be read" in _line(AutoSae.open, "user/none")


def test_a_public_repo_is_not_taken_for_a_private_one_nor_an_lm_for_a_head(hub, run):
    Release(run, "user/saes").push()
    before = hub.commits("user/saes")
    assert "exists and is public, but private was asked for" in _line(Release(run, "user/saes").push, private=True)
    lm = hub.root / "user" / "lm"
    lm.mkdir(parents=True)
    (lm / "config.json").write_text('{"model_type": "llama"}')
    (lm / "model.safetensors").write_bytes(b"weights")
    assert "'user/lm' is taken: it holds config.json, model.safetensors and no head" in _line(
        Release(run, "user/lm").push
    )
    assert hub.commits("user/saes") == before and set(hub.files("user/lm")) == {"config.json", "model.safetensors"}

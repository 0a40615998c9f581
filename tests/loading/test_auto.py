import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.loading.repository import Repository
from sae_accel.loading.sae_heads import HeadNotFound, SaeHeads
from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    for i in (10, 2):
        SaeModel(SaeConfig(d_in=16, k=4)).save_pretrained(tmp_path / "run" / f"layers.{i}")
    config = TranscoderConfig(d_in=16, d_out=8, k=4, skip_connection=True)
    TranscoderModel(config).save_pretrained(tmp_path / "run" / "layers.2.mlp" / "wide")
    SaeModel(SaeConfig(d_in=16, k=4)).save_pretrained(tmp_path / "run" / "checkpoint-5" / "layers.2")
    (tmp_path / "run" / "logs").mkdir()
    return tmp_path / "run"


def test_a_folder_of_many_heads_is_a_mapping_in_natural_order_that_loads_when_asked(folder):
    saes = AutoSae.from_pretrained(folder)
    assert isinstance(saes, SaeHeads) and list(saes) == ["layers.2", "layers.2.mlp/wide", "layers.10"]
    assert len(saes) == 3 and "layers.10" in saes and "layers.3" not in saes and saes.get("layers.3") is None
    assert "(loaded)" not in repr(saes)
    assert isinstance(saes["layers.2.mlp/wide"], TranscoderModel) and saes["layers.2"] is saes["layers.2"]
    assert saes["layers.10"].config.hookpoint == "layers.10" and repr(saes).count("(loaded)") == 3


def test_the_mapping_fits_the_hidden_states_of_an_lm(folder):
    hidden_states = [torch.randn(2, 5, 16) for _ in range(3)]
    latents = [
        sae.encode(hidden) for sae, hidden in zip(AutoSae.from_pretrained(folder).values(), hidden_states, strict=True)
    ]
    assert [found.top_acts.shape for found in latents] == [(2, 5, 4)] * 3


def test_one_head_is_the_model_itself_by_name_folder_or_checkpoint(folder):
    expected = load_file(folder / "layers.10" / "model.safetensors")
    for sae in (
        AutoSae.from_pretrained(folder, hookpoint="layers.10"),
        AutoSae.from_pretrained(str(folder), subfolder="layers.10"),
        AutoSae.from_pretrained(folder / "layers.10"),
        SaeModel.from_pretrained(folder, hookpoint="layers.10"),
        AutoModel.from_pretrained(folder / "layers.10"),
    ):
        assert isinstance(sae, SaeModel)
        assert all(torch.equal(value, expected[name]) for name, value in sae.state_dict().items())
    assert isinstance(AutoSae.from_pretrained(folder / "checkpoint-5"), SaeModel)


def test_round_trips_are_exact_in_any_precision_and_in_shards(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        sae = SaeModel(SaeConfig(d_in=24, k=4, activation="groupmax", num_latents=96)).to(dtype)
        sae.save_pretrained(tmp_path / str(dtype), max_shard_size="5KB")
        back = AutoSae.from_pretrained(tmp_path / str(dtype), device_map="cpu")
        assert back.dtype == dtype and back.config.activation == "groupmax" and back.config.expansion_factor == 4
        assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), back.parameters(), strict=True))
    assert AutoSae.from_pretrained(tmp_path / "torch.bfloat16", dtype=torch.float32).dtype == torch.float32


def test_a_missing_tensor_gets_our_initial_value_and_the_rest_is_kept(folder):
    file = folder / "layers.2" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.weight"].mul_(3)
    del tensors["W_dec"]
    save_file(tensors, file, metadata={"format": "pt"})
    sae = SaeModel.from_pretrained(folder, hookpoint="layers.2")
    assert torch.equal(sae.encoder.weight, tensors["encoder.weight"])
    torch.testing.assert_close(sae.W_dec, torch.nn.functional.normalize(tensors["encoder.weight"], dim=-1))


def test_the_encoder_alone_encodes_and_says_why_it_cannot_decode(folder):
    whole = AutoSae.from_pretrained(folder, hookpoint="layers.2")
    part = AutoSae.from_pretrained(folder, hookpoint="layers.2", encoder_only=True)
    x = torch.randn(3, 16)
    assert part.W_dec is None and torch.equal(part.encode(x).top_acts, whole.encode(x).top_acts)
    with pytest.raises(ValueError, match="encoder_only"):
        part.decode(*part.encode(x))


def test_what_is_not_there_is_named_with_what_is(folder, tmp_path):
    with pytest.raises(HeadNotFound, match="no head 'layers.11'. Near names: layers.10"):
        AutoSae.from_pretrained(folder, hookpoint="layers.11")
    with pytest.raises(InputError, match="There is no folder './nothing'"):
        AutoSae.from_pretrained("./nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no SAE or transcoder"):
        AutoSae.from_pretrained(tmp_path / "empty")


def test_two_names_for_one_head_must_agree(folder):
    for names in ({"subfolder": "layers.2", "hookpoint": "layers.10"}, {"subfolder": "x", "hookpoint": ""}):
        with pytest.raises(InputError, match="both name the head to load. Give one"):
            AutoSae.from_pretrained(folder, **names)
    same = AutoSae.from_pretrained(folder, subfolder="layers.2", hookpoint="layers.2")
    assert same.config.hookpoint == "layers.2" and len(AutoSae.from_pretrained(folder, subfolder="")) == 3
    with pytest.raises(InputError, match="AutoSae.open takes no argument 'hookpoint'"):
        AutoSae.open(folder, hookpoint="layers.2")


def test_a_run_that_was_interrupted_names_its_newest_checkpoint_with_heads(folder, tmp_path):
    for step in (9, 10):
        shutil.copytree(folder / "layers.2", tmp_path / "half" / f"checkpoint-{step}" / "layers.2")
    (tmp_path / "half" / "checkpoint-11").mkdir()
    (tmp_path / "half" / "checkpoint-11" / "training_state.pt").write_bytes(b"")
    with pytest.raises(InputError, match="holds no SAE or transcoder at its top.* Load the newest, ") as error:
        AutoSae.from_pretrained(tmp_path / "half")
    newest = re.search("the newest, '(.*)'", str(error.value))[1]
    assert newest == str(tmp_path / "half" / "checkpoint-10") and isinstance(AutoSae.from_pretrained(newest), SaeModel)


def test_of_what_is_no_head_only_the_config_is_fetched(folder, monkeypatch):
    fetched, fetch = [], Repository.fetch
    monkeypatch.setattr(Repository, "fetch", lambda self, file: fetched.append(file) or fetch(self, file))
    (folder / "layers.10" / "config.json").write_text('{"model_type": "llama"}')
    for load in (AutoSae.from_pretrained, lambda path: AutoSae.open(path).load("")):
        with pytest.raises(InputError, match="it is a llama, not an SAE or transcoder"):
            load(folder / "layers.10")
    assert set(fetched) == {"config.json"}
    AutoSae.from_pretrained(folder / "layers.2")
    assert "model.safetensors" in fetched


def test_broken_and_foreign_files_are_refused_in_one_line(folder, tmp_path):
    file = folder / "layers.2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    (folder / "layers.10" / "config.json").write_text('{"model_type": "llama"}')
    for hookpoint in ("layers.2", "layers.10"):
        with pytest.raises(InputError, match=f"head '{hookpoint}'") as error:
            AutoSae.from_pretrained(folder, hookpoint=hookpoint)
        assert "\n" not in str(error.value)


def test_a_config_that_disagrees_with_its_weights_is_refused_in_one_line(folder, capfd):
    config = json.loads((folder / "layers.2" / "config.json").read_text())
    (folder / "layers.2" / "config.json").write_text(json.dumps(config | {"num_latents": 500}))
    with pytest.raises(
        InputError, match=r"by config.json [\w.]+ should have shape \(500\b.*, but in model.safetensors it has"
    ):
        AutoSae.from_pretrained(folder, hookpoint="layers.2")
    captured = capfd.readouterr()
    assert not captured.out + captured.err


def test_heads_are_selected_by_globs_without_being_loaded(folder):
    saes = AutoSae.open(folder)
    loaded = saes["layers.10"]
    chosen = saes.select("layers.*")
    assert list(chosen) == ["layers.2", "layers.10"] and chosen["layers.10"] is loaded
    assert list(saes.select("layers.2.mlp", "layers.[2]")) == ["layers.2", "layers.2.mlp/wide"]
    assert list(saes.select("**")) == list(saes) and "(loaded)" not in repr(saes.select("layers.2*", "layers.2.*"))
    with pytest.raises(HeadNotFound, match="no head that 'h.*' matches. Near names: "):
        saes.select("h.*")


def test_a_mapping_is_written_in_our_layout(folder, tmp_path):
    AutoSae.open(folder).save_pretrained(tmp_path / "copy")
    for name, sae in AutoSae.open(tmp_path / "copy").items():
        expected = load_file(folder / name / "model.safetensors")
        assert all(torch.equal(value, expected[key]) for key, value in sae.state_dict().items())
    assert list(AutoSae.open(tmp_path / "copy")) == list(AutoSae.open(folder))


def _in_fresh_process(
    code: str, home: Path, input: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """The Hub's client reads its settings when it is imported, so each case has a process and a cache of its own."""
    fixed = {
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", "from sae_accel import AutoSae\n" + code]
    variables = kept | fixed | environment
    return subprocess.run(command, env=variables, input=input, cwd=cwd, capture_output=True, text=True)


def test_a_hub_repo_is_listed_once_and_one_heads_files_are_fetched(folder, tmp_path):
    os.renames(folder, tmp_path / "hub" / "user" / "saes")
    code = "s = AutoSae.from_pretrained('user/saes'); print(*s); print(s['layers.10'].W_dec.sum().item())"
    with HubServer(tmp_path / "hub") as hub:
        done = _in_fresh_process(code, tmp_path / "home", HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
        fetched = {re.split("/resolve/[^/]*/", line)[-1] for line in hub.requests}
    names, total = done.stdout.splitlines()
    assert names == "layers.2 layers.2.mlp/wide layers.10"
    expected = load_file(tmp_path / "hub" / "user" / "saes" / "layers.10" / "model.safetensors")["W_dec"].sum().item()
    assert float(total) == expected
    assert {f"layers.10/{name}" for name in ("config.json", "model.safetensors")} <= fetched
    assert not any(name.startswith("layers.2") and name.endswith(".safetensors") for name in fetched)
    # One head in the cache is not the only one of the repo, and must not be given where a mapping is given online.
    offline = """
print(AutoSae.from_pretrained('user/saes', hookpoint='layers.10').W_dec.sum().item())
print(*AutoSae.open('user/saes'))
try:
    print(AutoSae.from_pretrained('user/saes'))
except ValueError as error:
    print(error)
"""
    again = _in_fresh_process(offline, tmp_path / "home", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    total, names, line = again.stdout.splitlines()
    assert float(total) == expected and names == "layers.10"
    assert "has head 'layers.10' in the cache, and may have others" in line
    assert "hookpoint='layers.10'" in line and "AutoSae.open" in line


def test_the_hubs_own_reason_is_given(folder, tmp_path):
    os.renames(folder, tmp_path / "hub" / "user" / "gated")
    code = """
for name, token in (("user/nothing", None), ("user/gated", None), ("user/gated", "secret")):
    try:
        print(len(AutoSae.from_pretrained(name, token=token)))
    except ValueError as error:
        print(type(error).__name__, error)
"""
    with HubServer(tmp_path / "hub", private=("user/gated",)) as hub:
        done = _in_fresh_process(code, tmp_path / "home", HF_ENDPOINT=hub.url)
    nothing, gated, allowed = done.stdout.splitlines()
    assert nothing.startswith("AccessRefused 'user/nothing' cannot be read: there is no such repo")
    assert gated.startswith("AccessRefused 'user/gated' cannot be read") and "restricted" in gated
    assert allowed == "3"
    unreachable = _in_fresh_process(code, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert "is not in the cache, and the Hub cannot be reached" in unreachable.stdout.splitlines()[0]


def test_code_that_comes_with_a_repo_is_neither_run_nor_asked_about(folder, tmp_path):
    code = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    for name, changes in (("layers.2", {}), ("layers.10", {"model_type": "evil"})):
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code} | changes))
        (folder / name / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    os.renames(folder, tmp_path / "hub" / "user" / "saes")
    load = """
for where in ("user/saes", "hub/user/saes"):
    for name in ("layers.2", "layers.10"):
        for get in (lambda: AutoSae.from_pretrained(where, hookpoint=name), lambda: AutoSae.open(where).config(name)):
            try:
                print(type(get()).__name__)
            except ValueError as error:
                print(error)
"""
    with HubServer(tmp_path / "hub") as hub:
        done = _in_fresh_process(load, tmp_path / "home", input="y\n" * 20, cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0:2] == lines[4:6] == ["SaeModel", "SaeConfig"]
    assert all("it is a evil, not an SAE or transcoder" in line for line in lines[2:4] + lines[6:8])
    assert len(lines) == 8 and not (tmp_path / "ran").exists()

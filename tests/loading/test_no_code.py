"""Code that comes with a folder or repo leaves a mark where it runs. There is none, whatever a terminal answers."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import command_words, tiny_llama

import sae_accel.train as train
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel


ROOT = Path(__file__).parent.parent.parent
CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
MAPS = {name: f"evil.Evil{name.removeprefix('Auto')}" for name in CLASSES}
# Of what is tried with heads.
NAMES = ("one", "many", "config", "own", "auto", "convert", "push", "init_from")
MAPS["AutoTokenizer"] = ["evil.EvilTokenizer", "evil.EvilTokenizerFast"]
# Run one after another in one process whose terminal says "y" to all; each line of output is an outcome.
ASKED = """
import sys
sys.path.insert(0, ".")
import sae_accel
from sae_accel import AutoSae, SaeConfig, SaeModel, convert, push, train
from transformers import AutoConfig, AutoModel

def tell(name, work):
    try:
        print(name, work(), file=sys.__stdout__, flush=True)
    except Exception as error:
        print(name, type(error).__name__, error, file=sys.__stdout__, flush=True)

"""


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


@pytest.fixture
def asked(monkeypatch):
    """What was asked on a terminal that answers "y"."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    return questions


def put_code_in(folder, mark, **config):
    """Names code in every file in which transformers, or PEFT, look for it."""
    code = f"open({str(mark)!r}, 'w')\n"
    for path in (folder / "evil.py", folder / "custom_generate" / "generate.py", folder / f"{folder.name}.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    files = ("config", "tokenizer_config", "processor_config", "preprocessor_config", "generation_config")
    for name in files:
        path = folder / f"{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= {"auto_map": MAPS, "custom_generate": "custom_generate"} | (config if name == "config" else {})
        path.write_text(json.dumps(content))


def answers_of(code, cwd) -> list[str]:
    """What is printed by code in a process on a terminal that answers everything by "y"."""
    ours, its = pty.openpty()
    os.write(ours, b"y\n" * 50)
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASKED + code],
            stdin=its,
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "home")},
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        os.close(ours)
        os.close(its)
    assert "[y/N]" not in done.stdout + done.stderr and done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_heads_load_convert_and_go_out_without_the_code_beside_them(place, tmp_path, mark):
    for name in ("layers.1", "layers.2"):
        folder = tmp_path / "heads" / name
        SaeModel(SaeConfig(d_in=24, num_latents=96, k=4, hookpoint=name)).save_pretrained(folder)
        adapter = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "evil"}))
        put_code_in(folder, mark)
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    words = command_words(place, tmp_path, **{"training.init_from": "heads", "training.max_steps": 1})
    outcomes = answers_of(
        f"""
tell("one", lambda: type(AutoSae.from_pretrained("heads/layers.1")).__name__)
tell("many", lambda: [type(AutoSae.open("heads")[name]).__name__ for name in ("layers.1", "layers.2")])
tell("config", lambda: type(AutoSae.open("heads").config("layers.1")).__name__)
tell("own", lambda: type(SaeModel.from_pretrained("heads/layers.1")).__name__)
tell("own config", lambda: type(SaeConfig.from_pretrained("heads/layers.1")).__name__)
tell("auto config", lambda: type(AutoConfig.from_pretrained("heads/layers.1")).__name__)
tell("auto", lambda: type(AutoModel.from_pretrained("heads/layers.1")).__name__)
tell("convert", lambda: convert.main(["heads", "to", "--to", "saelens"]))
tell("push", lambda: push.main(["heads", "nobody/nothing", "--dry-run"]))
tell("init_from", lambda: train.main({words!r}))
""",
        tmp_path,
    )
    assert not mark.exists()
    told = [line for line in outcomes if line.split(" ")[0] in NAMES]
    assert told == [
        "one SaeModel",
        "many ['SaeModel', 'SaeModel']",
        "config SaeConfig",
        "own SaeModel",
        "own config SaeConfig",
        "auto config SaeConfig",
        "auto SaeModel",
        "convert 0",
        "push 0",
        "init_from 0",
    ]


def test_an_lm_that_transformers_knows_runs_none_of_the_code_beside_it(place, tmp_path, mark, asked):
    lm = tmp_path / "lm"
    tiny_llama().save_pretrained(lm)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (lm / file).write_bytes((place / "lm" / file).read_bytes())
    put_code_in(lm, mark)
    for loss in ("fvu", "ce"):
        words = command_words(place, tmp_path / loss, **{"model.name_or_path": lm, "training.loss": loss})
        assert train.main(words) == 0
    assert not mark.exists() and not asked


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_an_lm_that_needs_its_own_code_is_refused_unless_that_is_trusted(place, tmp_path, mark, what):
    lm = tmp_path / "lm"
    tiny_llama().save_pretrained(lm)
    put_code_in(lm, mark, **({"model_type": "evil"} if what == "config" else {}))
    if what == "config":
        (lm / "tokenizer.json").write_bytes((place / "lm" / "tokenizer.json").read_bytes())
    else:
        (lm / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"AutoTokenizer": MAPS["AutoTokenizer"]}, "tokenizer_class": "EvilTokenizer"})
        )
    words = command_words(place, tmp_path, **{"model.name_or_path": lm})
    told = answers_of(
        f"""
from pathlib import Path
sys.stderr = sys.stdout
tell("refused", lambda: (train.main({words!r}), Path({str(mark)!r}).exists()))
tell("trusted", lambda: (train.main({words!r} + ["--model.trust_remote_code"]), Path({str(mark)!r}).exists()))
""",
        tmp_path,
    )
    ours = [line for line in told if line.startswith(("sae_accel: ", "refused", "trusted"))]
    assert ours[0].startswith("sae_accel: model.name_or_path: ") and "--model.trust_remote_code true" in ours[0]
    # The code leaves its mark, and has no class in it.
    assert ours[1] == "refused (2, False)" and ours[-1] == "trusted (2, True)"
    assert [line for line in told if "will run: model" in line] == [ours[2]] and repr(str(lm)) in ours[2]


def evil_lm(folder, place, mark):
    tiny_llama().save_pretrained(folder / "lm")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "lm" / file).write_bytes((place / "lm" / file).read_bytes())
    (folder / "lm" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil(mark)}, folder / "lm" / "pytorch_model.bin")
    return {"model.name_or_path": folder / "lm"}


def evil_adapter(folder, place, mark):
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder / "adapter")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Evil(mark)}, folder / "adapter" / "adapter_model.bin")
    return {"model.adapter": folder / "adapter"}


def evil_checkpoint(folder, place, mark):
    assert train.main(command_words(place, folder)) == 0
    (state,) = (folder / "run" / "checkpoint-3").glob("*.pt")
    torch.save({"identity": Evil(mark)}, state)
    return {"training.resume_from_checkpoint": folder / "run" / "checkpoint-3"}


def evil_heads(folder, place, mark):
    (folder / "heads").mkdir()
    torch.save({"encoder.weight": Evil(mark)}, folder / "heads" / "ae.pt")
    (folder / "heads" / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoder"}}')
    return {"training.init_from": folder / "heads"}


def evil_script(folder, place, mark):
    (folder / "rows").mkdir()
    (folder / "rows" / "rows.py").write_text(f"open({str(mark)!r}, 'w')\n")
    return {"data.path": folder / "rows"}


def evil_trusted_script(folder, place, mark):
    return evil_script(folder, place, mark) | {"data.load_args": "{trust_remote_code: true}"}


def evil_script_file(folder, place, mark):
    return {"data.path": evil_script(folder, place, mark)["data.path"] / "rows.py"}


def evil_pandas(folder, place, mark):
    torch.save(Evil(mark), folder / "rows.pkl", _use_new_zipfile_serialization=False)
    return {"data.path": "pandas", "data.load_args": f"{{data_files: {folder}/rows.pkl}}"}


EVIL = [
    evil_lm,
    evil_adapter,
    evil_checkpoint,
    evil_heads,
    evil_script,
    evil_trusted_script,
    evil_script_file,
    evil_pandas,
]


@pytest.mark.filterwarnings("ignore:The Pandas builder is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", EVIL)
def test_a_pickle_or_script_is_refused_in_one_line_and_not_run(place, tmp_path, mark, capsys, kind):
    words = command_words(place, tmp_path, **kind(tmp_path, place, mark))
    capsys.readouterr()
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert not mark.exists() and len([line for line in error.splitlines() if line.startswith("sae_accel: ")]) == 1
    assert "Traceback" not in error


def test_a_pickle_that_heads_are_is_refused(tmp_path, mark):
    evil_heads(tmp_path, None, mark)
    with pytest.raises(ValueError, match="heads"):
        AutoSae.from_pretrained(tmp_path / "heads")
    assert not mark.exists()


def test_the_pickle_would_leave_a_mark(tmp_path, mark):
    torch.save({"a": Evil(mark)}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)["a"].close()
    assert mark.exists()

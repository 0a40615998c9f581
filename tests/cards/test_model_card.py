import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.numpy import save_file
from tiny import tiny_llama, tiny_tokens, tiny_trainer

from sae_accel.cards.model_card import MARK, write_card
from sae_accel.cards.plots import draw_plots
from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel
from sae_accel.recipe.arguments import (
    DataArguments,
    HeadArguments,
    LoraArguments,
    ModelArguments,
    SaeTrainingArguments,
)
from sae_accel.recipe.recipe import Recipe


LM, DATA = "acme/tiny-llama", "acme/tokens"
SAES = HeadArguments(hookpoints="layers.[12]", k=4, expansion_factor=4, dead_after_tokens=500)
TRANSCODER = HeadArguments(hookpoints="layers.0.mlp", type="transcoder", skip_connection=True, k=3, num_latents=50)


def make_run(folder: Path, heads, **kwargs) -> None:
    """What a run leaves in its folder."""
    lm = tiny_llama()
    lm.config.name_or_path = LM
    trainer = tiny_trainer(folder, heads, lm, held_out=tiny_tokens(8), **({"max_steps": 10} | kwargs))
    trainer.train()
    training = SaeTrainingArguments(output_dir="runs/tiny", max_steps=10, optim="adam", learning_rate=1e-3)
    data = DataArguments(path=DATA, name="small", ctx_len=16)
    Recipe(ModelArguments(name_or_path=LM, revision="v1"), data, heads, training).save(folder / "recipe.yaml")
    frequencies = {name: np.linspace(0, 0.1, plan.config.num_latents) for name, plan in trainer.plans.items()}
    save_file({k: v.astype(np.float32) for k, v in frequencies.items()}, folder / "latent_frequency.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    make_run(folder, [SAES, TRANSCODER])
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy to write into, with its parent as the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def bare(tmp_path):
    """A folder with a head alone."""
    SaeModel(SaeConfig(d_in=8, num_latents=20, k=None, activation="relu")).save_pretrained(tmp_path / "bare/h.0")
    return tmp_path / "bare"


def rows(card: ModelCard) -> dict[str, list[str]]:
    """The lines of the card's first table by their first cell."""
    table = re.search(r"(?:^\|.*\n)+", card.text, re.MULTILINE)[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in cells}


def snippet(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


def test_the_metadata_says_what_the_folder_says(run):
    card = ModelCard.load(write_card(run, "acme/saes", "mit"))
    data = card.data.to_dict()
    assert (data["base_model"], data["datasets"], data["library_name"]) == (LM, [DATA], "sae_accel")
    assert data["tags"] == ["sparse-autoencoder", "transcoder", "mechanistic-interpretability", "sae_accel"]
    assert data["license"] == "mit" and "license" not in ModelCard.load(write_card(run, "acme/saes")).data.to_dict()
    name, results = model_index_to_eval_results(data["model-index"])
    metrics = json.loads((run / "metrics.json").read_text())
    found = {f"eval/{result.metric_type}/{result.metric_args['head']}": result.metric_value for result in results}
    assert name == "acme/saes" and len(found) == 9
    assert found == {key: metrics[key] for key in found}
    assert {(r.dataset_type, r.dataset_config, r.dataset_split) for r in results} == {(DATA, "small", "train")}


def test_the_table_has_the_numbers_of_the_metrics(run):
    metrics = json.loads((run / "metrics.json").read_text())
    table = rows(ModelCard.load(write_card(run)))
    assert list(table) == ["name", "---", "`layers.0.mlp`", "`layers.1`", "`layers.2`"]
    assert table["name"] == [
        "type",
        "d_in → latents → d_out",
        "activation",
        "k",
        "FVU",
        "L0",
        "silent",
        "silent in training",
    ]
    for name, start in {
        "layers.0.mlp": ["skip transcoder", "24 → 50 → 24", "topk", "3"],
        "layers.1": ["SAE", "24 → 96 → 24", "topk", "4"],
    }.items():
        fvu, l0 = (metrics[f"{key}/{name}"] for key in ("eval/fvu", "eval/l0"))
        silent = (f"{metrics[f'{key}/{name}']:.1%}" for key in ("eval/silent", "train/silent"))
        assert table[f"`{name}`"] == [*start, f"{fvu:.4f}", f"{l0:.1f}", *silent]


def test_the_text_says_what_was_trained_on_what(run):
    text = ModelCard.load(write_card(run, "acme/saes")).text
    assert (
        "# saes\n\n2 sparse autoencoders (SAEs) and a skip transcoder on the activations of `acme/tiny-llama`" in text
    )
    assert "at revision `v1`. Trained on 640 tokens of `acme/tokens` (small), in sequences of 16 tokens, " in text
    assert "with Adam at a learning rate of 0.001: each head on its own squared error." in text
    assert "on 128 held-out tokens" in text and "the latest training tokens" in text
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["heads"][0]["k"] == 4
    assert "2406.04093" in text and "2406.11944" in text
    assert "2412.06410" not in text and "2407.14435" not in text and "LoRA" not in text


def test_the_snippets_run_as_printed(run, bare):
    shutil.copytree(run / "layers.1", "single/layers.1")
    # One process for all, since it takes seconds to start.
    code = "print()\n".join(snippet(write_card(folder)) for folder in (Path("run"), Path("single"), bare))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    many, one, relu = (lines.splitlines() for lines in done.stdout.split("\n\n"))
    assert many[0].startswith("3 heads in 'run'")
    assert many[-2:] == ["torch.Size([8, 3]) torch.Size([8, 3])", "torch.Size([8, 24])"]
    assert one == ["torch.Size([8, 4]) torch.Size([8, 4])", "torch.Size([8, 24])"]
    assert relu[-1] == "torch.Size([8, 8])"


def test_the_snippet_says_where_activations_come_from(run):
    text = write_card(run, "acme/saes").read_text()
    assert 'AutoSae.from_pretrained("acme/saes")' in text and str(run) not in text
    assert f'the input of module layers.0.mlp of AutoModel.from_pretrained("{LM}"): shape (tokens, 24)' in text
    shutil.rmtree(run / "layers.0.mlp")
    assert "the output of module layers.1 of" in write_card(run, "acme/saes").read_text()


def test_the_plots_are_images_that_the_card_shows(run):
    from matplotlib.image import imread

    text = write_card(run).read_text()
    shown = dict(re.findall(r"!\[(.+)\]\((.+)\)", text))
    assert sorted(shown.values()) == ["plots/firing_frequency.png", "plots/fvu.png"]
    for file in shown.values():
        image = imread(run / file)
        assert image.shape[:2] == (450, 800) and image[..., :3].std() > 0.05


def test_many_heads_and_odd_values_are_drawn(tmp_path):
    from matplotlib.image import imread

    names = [f"_layers.{i}.$odd$name" for i in range(40)]
    log = [{"train/tokens": n, **{f"train/fvu/{name}": 9.0 / n for name in names}} for n in (1, 5, 1000)]
    odd = [{"train/tokens": 2000, f"train/fvu/{names[0]}": value} for value in (float("nan"), float("inf"), 0.0)]
    frequencies = {name: np.array([0.0, 1e-7, 0.5, 1.0], dtype=np.float32) for name in names}
    frequencies[names[1]] = np.zeros(4, dtype=np.float32)
    fvu, histogram = draw_plots(tmp_path, names, log, frequencies)
    without = fvu.read_bytes()
    assert imread(fvu).shape[:2] == imread(histogram).shape[:2] == (450, 800)
    draw_plots(tmp_path, names, [*log, *odd, {"eval/tokens": 3}], frequencies)
    assert fvu.read_bytes() == without
    assert draw_plots(tmp_path, ["other"], log, frequencies) == []


def test_a_card_is_the_same_when_it_is_written_again(run):
    def content() -> dict[Path, bytes]:
        write_card(run, "acme/saes")
        return {path: path.read_bytes() for path in [run / "README.md", *(run / "plots").iterdir()]}

    first = content()
    assert len(first) == 3 and content() == first
    # Those of matplotlib would change with its version.
    assert not any(b"Software" in value or b"Matplotlib" in value for value in first.values())


def test_heads_alone_have_a_card_without_empty_parts(bare):
    card = ModelCard.load(write_card(bare, "acme/bare"))
    assert not re.search(r"\b(None|nan|null)\b|\{[{%]|\n\n\n|\(\)", card.content)
    assert card.content.rstrip().removesuffix(MARK).endswith("`sae_accel`.\n\n")
    assert re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", card.text, flags=re.DOTALL), re.MULTILINE) == [
        "bare",
        "Head",
        "Loading",
        "Credits",
    ]
    assert rows(card)["`h.0`"] == ["SAE", "8 → 20 → 8", "relu"] and "arXiv" not in card.text
    assert card.data.to_dict() == {
        "library_name": "sae_accel",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "sae_accel"],
    }
    assert not (bare / "plots").exists()


def test_a_card_of_many_heads_is_short_and_tells_of_all(tmp_path):
    names = [f"layers.{i}" for i in range(64)]
    for name in names:
        SaeModel(SaeConfig(d_in=2, num_latents=4, k=1)).save_pretrained(tmp_path / name)
    fvu = {name: (i % 7 + 1) / 10 for i, name in enumerate(names[1:])}
    (tmp_path / "metrics.json").write_text(json.dumps({f"eval/fvu/{name}": value for name, value in fvu.items()}))
    path = write_card(tmp_path)
    card, lines = ModelCard.load(path), path.read_text().splitlines()
    assert len(lines) < 150
    assert rows(card)["FVU"] == ["0.4000", "0.1000", "0.7000"]
    folded = path.read_text().split("<summary>All 64 heads</summary>")[1].split("</details>")[0]
    assert [line.split("`")[1] for line in folded.splitlines() if line.startswith("| `")] == names
    (result,) = model_index_to_eval_results(card.data.to_dict()["model-index"])[1]
    assert result.metric_value == pytest.approx(sum(fvu.values()) / 63)
    assert result.metric_name == "FVU, mean of 63 heads" and result.metric_args == {"heads": 63}


def test_transcoders_alone_are_tagged_so(run):
    for name in ("layers.1", "layers.2"):
        shutil.rmtree(run / name)
    assert ModelCard.load(write_card(run)).data.tags == ["transcoder", "mechanistic-interpretability", "sae_accel"]


@pytest.mark.parametrize("place", ["here", "above", "absolute", "file", "builder"])
def test_what_is_local_is_never_named_as_a_repo(run, monkeypatch, place):
    lm, data = {"file": (LM, "tokens.bin"), "builder": (LM, "json")}.get(place, ("models/lm", "local/text"))
    if place in ("here", "above"):
        Path(lm).mkdir(parents=True)
        Path(data).mkdir(parents=True)
    if place == "absolute":
        lm, data = f"{run.parent}/{lm}", f"{run.parent}/{data}"
    if place == "above":
        monkeypatch.chdir("/")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"].update(path=data, load_args={"data_files": "x.jsonl"} if place == "builder" else {})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for config in run.glob("layers*/config.json"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": lm}))
    card = ModelCard.load(write_card(run))
    assert card.data.base_model == (LM if lm == LM else None) and card.data.datasets is None
    metadata = card.content.split("\n---\n")[0]
    assert {result.dataset_type for result in card.data.eval_results} == {"unspecified"}
    assert "local/text" not in metadata and "models/lm" not in metadata and str(run.parent) not in metadata


def test_a_run_by_the_lms_loss_shows_it_before_and_after(tmp_path):
    folder = tmp_path / "run"
    heads = [HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4)]
    make_run(folder, heads, max_steps=2, loss="kl", lora=LoraArguments(rank=2, train_heads=True))
    metrics = json.loads((folder / "metrics.json").read_text())
    card = ModelCard.load(write_card(folder))
    for words, key in (("cross-entropy with the heads", "ce"), ("KL divergence between the two", "kl")):
        assert f"| {words} | {metrics[f'initial/{key}']:.4f} | {metrics[f'eval/{key}']:.4f} |" in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["kl"] == metrics["eval/kl"] and results["fvu"] == metrics["eval/fvu/layers.1"]
    elsewhere = write_card(folder, "acme/saes", into=tmp_path, revision="v1", among_others=True).read_text()
    assert 'subfolder="adapter", revision="v1")' in elsewhere
    assert 'AutoSae.from_pretrained("acme/saes", revision="v1").select("layers.1")):' in elsewhere
    code = re.search(r"## LoRA.*?```python\n(.*?)```", card.text, re.DOTALL)[1]
    tiny_llama().save_pretrained(tmp_path / LM)
    names = {"input_ids": tiny_tokens(2).with_format("torch")["input_ids"][:]}
    exec(code.replace(f'"{LM}"', repr(str(tmp_path / LM))), names)
    assert names["logits"].shape == (2, 16, 101) and "2501.19406" in card.text


def test_names_of_heads_cannot_break_the_table(tmp_path):
    name = "h.0/a|b`c_*d*"
    SaeModel(SaeConfig(d_in=8, num_latents=20, k=2)).save_pretrained(tmp_path / name)
    (tmp_path / "metrics.json").write_text(json.dumps({f"eval/fvu/{name}": 0.25, f"eval/l0/{name}": float("nan")}))
    card = ModelCard.load(write_card(tmp_path))
    assert list(AutoSae.open(tmp_path)) == [name]
    assert rows(card)[r"`` h.0/a\|b`c_*d* ``"][-2:] == ["0.2500", "no number"] and "nan" not in card.content


def test_what_cannot_be_read_is_named(bare, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no folder '.*missing'"):
        write_card(tmp_path / "missing")
    with pytest.raises(InputError, match="no SAE or transcoder"):
        write_card(tmp_path / "empty")
    for file, content in (("metrics.json", "{"), ("recipe.yaml", "a: ["), ("log_history.jsonl", "{\n")):
        (bare / file).write_text(content)
        with pytest.raises(InputError, match=rf"{file}' (cannot be read|holds a list)"):
            write_card(bare)
        (bare / file).unlink()
    (bare / "latent_frequency.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="latent_frequency.safetensors' cannot be read"):
        write_card(bare)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("recipe.yaml", "model: 3", "int 3 as model, but must hold a mapping"),
        ("recipe.yaml", "data: {ctx_len: long}", "str 'long' as data.ctx_len, but must hold a whole number"),
        ("recipe.yaml", "heads: [3]", r"int 3 as heads\[0\], but must hold a mapping"),
        ("recipe.yaml", "training: {optim: [adam]}", "as training.optim, but must hold text"),
        ("log_history.jsonl", "3", "int 3 as line 1, but must hold a mapping"),
        ("log_history.jsonl", "{}\n[1]", "list .1. as line 2, but must hold a mapping"),
        ("log_history.jsonl", '{"train/tokens": "x"}', "train/tokens, but must hold a number"),
        ("metrics.json", '{"eval/fvu/h.0": "low"}', "str 'low' as eval/fvu/h.0, but must hold a number"),
        ("latent_frequency.safetensors", np.full(20, np.nan), r"of shape \(20,\); it holds other values"),
        ("latent_frequency.safetensors", np.zeros((4, 5)), r"another shape: \(4, 5\)"),
    ],
)
def test_a_report_that_holds_what_it_should_not_is_named(bare, file, content, says):
    if isinstance(content, str):
        (bare / file).write_text(content)
    else:
        save_file({"h.0": content}, bare / file)
    with pytest.raises(InputError, match=rf"{file}' (holds|must hold) .*{says}"):
        write_card(bare)


def test_a_card_that_somebody_wrote_stays(run):
    card = run / "README.md"
    card.write_text("# My heads\n")
    assert write_card(run) == card and card.read_text() == "# My heads\n"


def test_a_card_elsewhere_of_some_heads(run, tmp_path):
    before = (run / "README.md").read_bytes() if (run / "README.md").exists() else None
    first = next(iter(AutoSae.open(run)))
    card = write_card(run, "user/some", include=[first], into=tmp_path)
    assert card == tmp_path / "README.md" and f"`{first}`" in card.read_text()
    assert card.read_text().count("AutoSae.from_pretrained('user/some')") + card.read_text().count('"user/some"') == 1
    assert ((run / "README.md").read_bytes() if (run / "README.md").exists() else None) == before

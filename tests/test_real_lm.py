"""Tests on a real language model, for properties that random weights cannot show."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_accel.data.tokens import chunk_and_tokenize
from sae_accel.lm.load import load_lm
from sae_accel.lm.splice import splice
from sae_accel.loading.auto import AutoSae
from sae_accel.recipe.arguments import HeadArguments, LoraArguments, SaeTrainingArguments
from sae_accel.recipe.recipe import load_recipe
from sae_accel.training.trainer import SaeTrainer


@pytest.fixture(scope="module")
def trained(real_lm, tmp_path_factory):
    """An SAE and a transcoder after a few steps on Python's language reference, with the LM and held-out tokens."""
    from pydoc_data.topics import topics

    torch.set_num_threads(2)
    text = Dataset.from_dict({"text": [topics[name] for name in sorted(topics)][:40]})
    tokens = chunk_and_tokenize(text, AutoTokenizer.from_pretrained(real_lm), ctx_len=128)
    folder = tmp_path_factory.mktemp("real") / "run"
    arguments = SaeTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=25, optim="adam", learning_rate=2e-3,
        logging_steps=5, report_to="none",
    )  # fmt: skip
    heads = [
        HeadArguments(layers=[1], k=32, expansion_factor=4),
        HeadArguments(hookpoints="layers.1.mlp", type="transcoder", skip_connection=True, k=32, expansion_factor=4),
    ]
    lm = AutoModelForCausalLM.from_pretrained(real_lm)
    held_out = tokens.select(range(4))
    trainer = SaeTrainer(lm, arguments, heads, tokens.select(range(4, len(tokens))), held_out)
    metrics = trainer.train().metrics
    yield folder, lm, held_out, trainer.state.log_history, metrics, heads
    torch.set_num_threads(1)


def test_fvu_falls_on_real_activations(trained):
    _, _, _, log, metrics, _ = trained
    for head, part in (("layers.1", 0.7), ("layers.1.mlp", 0.95)):
        assert log[-1][f"train/fvu/{head}"] < part * log[0][f"train/fvu/{head}"]
        assert metrics[f"eval/fvu/{head}"] < 1 and 16 < metrics[f"eval/l0/{head}"] <= 32


def test_a_trained_sae_keeps_more_of_the_lm_than_the_mean_does(trained):
    folder, lm, held_out, *_ = trained
    sae = AutoSae.from_pretrained(folder, hookpoint="layers.1")
    ids = torch.tensor(held_out["input_ids"])
    mean = AutoSae.from_pretrained(folder, hookpoint="layers.1")
    torch.nn.init.zeros_(mean.W_dec)
    with torch.no_grad():
        clean = lm(ids, labels=ids).loss
        with splice(lm, sae) as latents:
            spliced = lm(ids, labels=ids).loss
        with splice(lm, mean):
            ablated = lm(ids, labels=ids).loss
    assert clean < spliced < ablated
    assert latents["layers.1"].top_acts.shape == (4, 128, 32)


def test_a_lora_closes_part_of_the_gap_that_trained_heads_open(trained, tmp_path):
    folder, lm, held_out, *_, heads = trained
    arguments = SaeTrainingArguments(
        output_dir=str(tmp_path), init_from=str(folder), loss="kl", per_device_train_batch_size=2, max_steps=4,
        optim="adam", warmup_steps=0, lr_scheduler_type="constant", report_to="none",
    )  # fmt: skip
    lora = LoraArguments(rank=4, learning_rate=1e-3)
    try:
        trainer = SaeTrainer(lm, arguments, heads, held_out.select(range(2)), held_out.select(range(2)), lora=lora)
        metrics = trainer.train().metrics
    finally:
        trainer.adapter.unload()
    gaps = {when: metrics[f"{when}/ce"] - metrics[f"{when}/ce_clean"] for when in ("initial", "eval")}
    assert 0 < gaps["eval"] < 0.9 * gaps["initial"] and metrics["eval/kl"] < 0.9 * metrics["initial/kl"]


def test_the_quickstart_recipe_reads_the_model_as_a_folder(real_lm):
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "quickstart.yaml")
    assert Path(recipe.model.name_or_path).name == Path(real_lm).name
    recipe.model.name_or_path = real_lm
    assert load_lm(recipe.model).config.hidden_size == 576

"""Activations that are chosen over a batch, or by thresholds that are learnt, on several processes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import command_words, run_together
from ways import GLOBAL_BATCH, WAYS

from sae_accel.loading.auto import AutoSae
from sae_accel.train import main


HEADS = [
    {"hookpoints": ["layers.1"], "k": 4, "num_latents": 97, "activation": "jumprelu", "auxk_alpha": 0.03},
    {"hookpoints": ["layers.2"], "k": 4, "num_latents": 96, "activation": "batchtopk"},
]
# Those that differ in where a threshold lies, and in how it moves.
TRIED = ("ddp", "fsdp", "zero3", "modules", "latents")
# Here every process sees all tokens of a batch, so that it is the batch of one process.
SAME_BATCH = {"modules": ["layers.1", "layers.2"], "latents": ["layers.1"]}


def _words(place, folder, processes, heads=HEADS, **changes):
    recipe = folder / f"{len(heads)}.yaml"
    recipe.write_text(json.dumps({"heads": heads}))
    options = {
        "training.per_device_train_batch_size": GLOBAL_BATCH // processes,
        "training.optim": "adam",
        "training.learning_rate": 1e-3,
        "training.max_steps": 4,
        "data.eval_examples": 12,
    }
    words = command_words(place, folder, **options | changes)
    kept = [(name, value) for name, value in zip(words[::2], words[1::2], strict=True) if "--heads." not in name]
    return [str(recipe), *(word for pair in kept for word in pair)]


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    assert main(_words(place, folder, 1, **{"training.output_dir": folder / "alone"})) == 0
    words = {}
    for way in TRIED:
        _, changes, environment = WAYS[way]
        heads = HEADS[:1] if way == "latents" else HEADS
        one = _words(place, folder, 2, heads, **{"training.output_dir": folder / way} | changes)
        words[way] = {"words": one, "environment": environment}
    both = {"training.output_dir": folder / "refused", "training.distribute_latents": "true"}
    words["refused"] = {"words": _words(place, folder, 2, **both)}
    return folder, run_together(2, words, folder)[0]


@pytest.mark.parametrize("way", SAME_BATCH)
def test_heads_are_those_of_one_process_where_the_batch_is(runs, way):
    folder, _ = runs
    for name in SAME_BATCH[way]:
        expected, found = (load_file(folder / one / name / "model.safetensors") for one in ("alone", way))
        for key, value in expected.items():
            assert (value - found[key]).norm() <= 1e-5 * value.norm(), (name, key)


@pytest.mark.parametrize("way", [way for way in TRIED if way != "latents"])
def test_every_way_ends_with_thresholds_by_which_heads_select(runs, way):
    folder, _ = runs
    metrics = json.loads((folder / way / "metrics.json").read_text())
    alone = AutoSae.open(folder / "alone")
    for name, sae in AutoSae.open(folder / way).items():
        assert torch.isfinite(sae.threshold).all() and (sae.threshold > 0).all()
        torch.testing.assert_close(sae.threshold.mean(), alone[name].threshold.mean(), rtol=0.2, atol=0)
        assert 1 < metrics[f"eval/l0/{name}"] < 12


def test_latents_that_compete_over_a_batch_are_not_shared_out(runs):
    assert "has batchtopk, whose latents compete over a whole batch" in runs[1]["refused"][0]["refused"]

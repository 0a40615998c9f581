"""The same run on one process and on several, in every way in which heads can be spread over them."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import command_words, run_together
from ways import GLOBAL_BATCH, WAYS

from sae_accel.loading.auto import AutoSae
from sae_accel.train import main


# Widths that three processes cannot share evenly, a transcoder, AuxK with dead latents, Multi-TopK, k decay, groupmax,
# own learning rates: whatever has a state or a number that could be another on several processes.
HEADS = [
    {"hookpoints": ["layers.[12]"], "k": 4, "num_latents": 97, "auxk_alpha": 0.03, "dead_after_tokens": 150},
    {
        "hookpoints": ["layers.0"],
        "k": 3,
        "expansion_factor": 4,
        "multi_topk": True,
        "k_decay_steps": 2,
        "name": "wide",
    },
    {"hookpoints": ["layers.0"], "k": 6, "num_latents": 96, "activation": "groupmax", "learning_rate": 0.01},
    {"hookpoints": ["layers.1.mlp"], "type": "transcoder", "skip_connection": True, "k": 4, "expansion_factor": 2},
]
SAES = ["layers.1", "layers.2", "layers.0/wide", "layers.0"]
NAMES = [*SAES, "layers.1.mlp"]
# The gradient of a new transcoder's b_dec, which starts as the mean of what it predicts, is zero but for rounding, and
# Adam and signum make whole steps of that. So adam starts anew and its transcoder is not compared; signum goes on
# from heads.
COMPARED = {"adam": SAES, "signum": NAMES}
HELD_OUT = 12
BIT_EXACT = ("ddp", "modules")
# Three processes are there for sizes that they do not divide, which is nothing to an optimizer.
OPTIMIZERS = {2: list(COMPARED), 3: ["adam"]}
# The stages of ZeRO deal out the same parts.
WAYS_OF = {2: list(WAYS), 3: [way for way in WAYS if way not in ("zero1", "zero2")]}


def _words(place, folder, processes, **changes):
    recipe = folder / "heads.yaml"
    if not recipe.exists():
        recipe.write_text(json.dumps({"heads": HEADS}))
    words = command_words(
        place,
        folder,
        **{
            "training.per_device_train_batch_size": GLOBAL_BATCH // processes,
            "training.gradient_accumulation_steps": 2,
            "training.micro_batches": 2,
            "training.learning_rate": 1e-3,
            "data.eval_examples": HELD_OUT,
            "training.logging_steps": 1,
            "training.save_steps": 2,
            "training.max_steps": 4,
        }
        | changes,
    )
    kept = [(name, value) for name, value in zip(words[::2], words[1::2], strict=True) if "--heads." not in name]
    return [str(recipe), *(word for pair in kept for word in pair)]


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """The run on one process, by optimizer, and the heads that signum starts from."""
    folder = tmp_path_factory.mktemp("alone")
    start = {"training.output_dir": folder / "start", "training.optim": "adam", "training.max_steps": 2}
    assert main(_words(place, folder, 1, **start)) == 0
    for optim in COMPARED:
        assert main(_words(place, folder, 1, **_optim(folder, optim), **{"training.output_dir": folder / optim})) == 0
    return folder


def _optim(alone, optim):
    return {"training.optim": optim} | ({"training.init_from": alone / "start"} if optim == "signum" else {})


@pytest.fixture(scope="module", params=[2, 3])
def together(request, place, alone, tmp_path_factory):
    """
    The run on several processes, by way and optimizer; and one that goes on, by each way, from a checkpoint that one
    process wrote.
    """
    processes, folder = request.param, tmp_path_factory.mktemp("together")
    runs = {}
    for way, (_, changes, environment) in ((way, WAYS[way]) for way in WAYS_OF[processes]):
        for optim in OPTIMIZERS[processes]:
            one = {"training.output_dir": folder / f"{way}-{optim}"} | _optim(alone, optim) | changes
            runs[f"{way}-{optim}"] = {"words": _words(place, folder, processes, **one), "environment": environment}
        more = {
            "training.output_dir": folder / f"{way}-resumed",
            **_optim(alone, "signum"),
            "training.resume_from_checkpoint": alone / "signum" / "checkpoint-2",
        }
        runs[f"{way}-resumed"] = {
            "words": _words(place, folder, processes, **more, **changes),
            "environment": environment,
        }
        if way in BIT_EXACT:
            again = {
                "training.output_dir": folder / f"{way}-again",
                **_optim(alone, optim),
                "training.resume_from_checkpoint": folder / f"{way}-{optim}" / "checkpoint-2",
            }
            runs[f"{way}-again"] = {"words": _words(place, folder, processes, **again, **changes)}
    return SimpleNamespace(processes=processes, folder=folder, found=run_together(processes, runs, folder)[0])


def _state(folder, name):
    return torch.load(folder / "checkpoint-4" / name / "training_state.pt", weights_only=True)


def _assert_same_heads(one, other, names=NAMES):
    for name in names:
        expected, found = (load_file(folder / name / "model.safetensors") for folder in (one, other))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert value.shape == found[key].shape and value.dtype == found[key].dtype
            assert (value - found[key]).norm() <= 1e-5 * value.norm(), (other, name, key)


def test_weights_metrics_and_state_are_those_of_one_process(alone, together):
    for way in WAYS_OF[together.processes]:
        for optim in OPTIMIZERS[together.processes]:
            _compare(alone, together, way, optim)


def _compare(alone, together, way: str, optim: str) -> None:
    name = f"{way}-{optim}"
    assert {one["spread"] for one in together.found[name]} == {WAYS[way][0]}
    _assert_same_heads(alone / optim, together.folder / name, COMPARED[optim])
    left_out = {name for name in NAMES if name not in COMPARED[optim]}
    expected, found = (json.loads((f / "metrics.json").read_text()) for f in (alone / optim, together.folder / name))
    assert expected.keys() == found.keys()
    for key in expected.keys() - {"train/tokens_per_second"}:
        if key.split("/", 2)[-1] not in left_out:
            assert found[key] == pytest.approx(expected[key], rel=1e-5), key
    first, second = (
        [json.loads(line) for line in (f / "log_history.jsonl").read_text().splitlines()]
        for f in (alone / optim, together.folder / name)
    )
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        kept = [key for key in one if key.split("/", 2)[-1] not in left_out]
        assert [one[key] for key in kept] == pytest.approx([other[key] for key in kept], rel=1e-5)
    expected, found = (load_file(f / "latent_frequency.safetensors") for f in (alone / optim, together.folder / name))
    for head in COMPARED[optim]:
        torch.testing.assert_close(found[head], expected[head])
        one, other = _state(alone / optim, head), _state(together.folder / name, head)
        assert torch.equal(one["tokens_since_fired"], other["tokens_since_fired"])
        assert one["optimizer"].keys() == other["optimizer"].keys()
        for parameter, state in one["optimizer"].items():
            for key, value in state.items():
                torch.testing.assert_close(other["optimizer"][parameter][key], value, rtol=1e-3, atol=1e-6)


def test_a_run_goes_on_from_the_checkpoint_of_one_process(alone, together):
    for way in WAYS_OF[together.processes]:
        _assert_same_heads(alone / "signum", together.folder / f"{way}-resumed")


@pytest.mark.parametrize("way", BIT_EXACT)
def test_a_run_that_goes_on_on_as_many_processes_ends_bit_for_bit_like_one_that_never_stopped(together, way):
    assert (together.folder / f"{way}-again" / "checkpoint-4").is_dir()
    last = OPTIMIZERS[together.processes][-1]
    # Three processes add gradients in no fixed order, so that two runs of the same differ in the last bits.
    same = torch.equal if together.processes == 2 else partial(torch.allclose, rtol=1e-4, atol=1e-6)
    for name in NAMES:
        whole, again = (_state(together.folder / f"{way}-{run}", name) for run in (last, "again"))
        if last == "signum":
            assert all(same(value, again["weights"][key]) for key, value in whole["weights"].items())
        one, other = (
            load_file(together.folder / f"{way}-{run}" / name / "model.safetensors") for run in (last, "again")
        )
        assert all(same(value, other[key]) for key, value in one.items())
        assert torch.equal(whole["tokens_since_fired"], again["tokens_since_fired"])


def test_modules_are_dealt_out_whole_and_activations_go_to_their_owners_alone(together):
    found = together.found["modules-adam"]
    assert sorted(name for one in found for name in one["heads"]) == sorted(NAMES)
    assert all(one["heads"] for one in found)
    # Besides training, activations were exchanged to start from and for evaluation: 4 steps of 2 batches, the first of
    # them twice, and the held-out sequences, in float32 of width 24.
    tokens = 16 * ((4 + 1) * 2 * GLOBAL_BATCH + HELD_OUT)
    sites = {"layers.1": 1, "layers.2": 1, "layers.0": 1, "layers.0/wide": 1, "layers.1.mlp": 2}
    owners = [{name.split("/")[0] for name in one["heads"]} for one in found]
    copies = sum(sites[name] for names in owners for name in names)
    everywhere = tokens * 5 * 24 * 4 * (together.processes - 1)
    sent = sum(one["bytes_sent"] for one in found)
    # A site whose heads lie on one process is sent to that alone: 1 / n of what everyone would have to be sent.
    assert sent * together.processes * 5 == everywhere * copies


def test_what_is_left_by_any_way_loads_as_ever(together):
    for way in WAYS_OF[together.processes]:
        saes = AutoSae.from_pretrained(together.folder / f"{way}-adam")
        assert sorted(saes) == sorted(NAMES)
        assert saes["layers.1"].encode(torch.zeros(2, 24)).top_indices.shape == (2, 4)

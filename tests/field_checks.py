"""Checks of single fields of a recipe: runs that differ in one field must differ as the field's help says."""

import math
from collections.abc import Callable
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from hub_repos import read_folder
from one_run import Run, Runs
from peft import PeftModel
from pytest import approx
from tiny import assert_equal, tiny_llama


Check = Callable[[str, Runs], None]
EVERY_STEP = {"training.logging_steps": 1}
# The learning rate is so small that the saved weights are the initial ones.
STILL = {"training.learning_rate": 1e-12}
COUNTING = {"data.path": "counting.bin"}
IN_ORDER = COUNTING | {"data.shuffle_seed": "null"}
DATASET = {"data.path": "dataset"}
NULLS = {"data.path": "nulls.jsonl"}
WHOLE_PASS = {"training.max_steps": None}
ALL_LAYERS = {"heads.hookpoints": "layers.*"}
ONE_HEAD = {"heads.hookpoints": "layers.1"}
TRANSCODER = {"heads.type": "transcoder", "heads.hookpoints": "layers.[12].mlp"}
JUMPRELU = {"heads.activation": "jumprelu"} | ONE_HEAD
ADAM = {"training.optim": "adam", "training.learning_rate": 1} | EVERY_STEP | {"training.max_steps": 4}
CONSTANT = {"training.lr_scheduler_type": "constant"}
LORA = {"training.loss": "ce", "lora.train_heads": "true"} | ONE_HEAD
LOGS = {"training.report_to": "tensorboard"}
PUSH = {"training.push_to_hub": "true"}
# Sizes large enough to show in a table in GB.
PLANNED = {"dry-run": 2, "model.name_or_path": "large", "heads.expansion_factor": 32}
ON_DISK = (
    "{embed_tokens: cpu, layers.0: cpu, layers.1: disk, layers.2: cpu, layers.3: cpu, norm: cpu, rotary_emb: cpu}"
)


class Says(str):
    """A text that equals every text which contains it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) in str(other)

    __hash__ = str.__hash__


class Shows(NamedTuple):
    """A check: `look` reads a run, `found` has the expected result per value, and `beside` sets other fields."""

    look: str | Callable[[Run], Any]
    found: dict[Any, Any]
    beside: Any = MappingProxyType({})

    def __call__(self, field: str, runs: Runs) -> None:
        look = attrgetter(self.look) if isinstance(self.look, str) else self.look
        for value, expected in self.found.items():
            found = look(runs({**self.beside, field: value}))
            assert found == expected, f"{field} {value}: {found}"


def both(*checks: Check) -> Check:
    """A check that runs several checks."""
    return lambda field, runs: [check(field, runs) for check in checks] and None


def place(run: Run) -> str:
    """The device of a layer's weights after the run; `meta` if they lie on disk."""
    return run.lm.layers[1].mlp.up_proj.weight.device.type


def is_never_saved(field: str, runs: Runs) -> None:
    run = runs({field: "hf_secret", "model.name_or_path": "owner/lm"})
    # The tokenizer of transformers lists files without the token, so only the fetches count.
    fetched = zip(run.requests, run.headers, strict=True)
    assert {headers["authorization"] for line, headers in fetched if "/resolve/" in line} == {"Bearer hf_secret"}
    saved = read_folder(run.folder)
    assert len(saved) > 10 and not any(b"hf_secret" in content for content in saved.values())
    assert "hf_secret" not in run.out + run.err


def changes_activations_and_no_name(field: str, runs: Runs) -> None:
    run, ids = runs({field: "adapter"}), runs().batches[0]
    with torch.no_grad():
        found, plain = (lm(ids, output_hidden_states=True).hidden_states[2] for lm in (run.lm, runs().lm))
        adapted = PeftModel.from_pretrained(tiny_llama(), "adapter").eval()
        expected = adapted(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain, atol=1e-2) and run.names == runs().names


def orders_sequences(field: str, runs: Runs) -> None:
    by_seed = {seed: runs({**COUNTING, field: seed}).sequences for seed in ("null", 42, 43)}
    assert by_seed["null"] == list(range(8, 32))
    assert len(set(map(tuple, by_seed.values()))) == 3 and runs(COUNTING).sequences == by_seed[42]


def selects(field: str, runs: Runs) -> None:
    kinds = {name: runs({field: name, **ONE_HEAD}) for name in ("topk", "groupmax", "batchtopk", "jumprelu")}
    tokens = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    chosen = {name: run.head().encode(tokens) for name, run in kinds.items()}
    counts = {name: set((latents.top_acts > 0).sum(-1).tolist()) for name, latents in chosen.items()}
    groups = {name: (latents.top_indices // 24).sort(-1).values for name, latents in chosen.items()}
    assert chosen["topk"].top_indices.shape == (64, 4) and (groups["groupmax"] == torch.arange(4)).all()
    assert not (groups["topk"] == torch.arange(4)).all()
    assert len(counts["batchtopk"]) > 3 and len(counts["jumprelu"]) > 3
    # batchtopk has one threshold for all latents, jumprelu one per latent.
    thresholds = {name: len(kinds[name].weights()["threshold"].unique()) for name in ("batchtopk", "jumprelu")}
    assert thresholds["batchtopk"] == 1 < thresholds["jumprelu"]
    assert kinds["batchtopk"].log("train/l0/layers.1") == [approx(4)]


def draws_initial_weights(field: str, runs: Runs) -> None:
    zero, one = (runs({field: seed, **STILL}) for seed in (0, 1))
    first, second, other = (
        run.weights(name)["encoder.weight"]
        for run, name in ((zero, "layers.1"), (one, "layers.1"), (zero, "layers.2"))
    )
    assert not torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(first, runs(STILL).weights()["encoder.weight"])


def weighs(step: int, beside: dict[str, Any]) -> Check:
    """A check with loss weights so large that other losses vanish: the gradient is in proportion to the weight."""

    def check(field: str, runs: Runs) -> None:
        light, heavy = (runs({**beside, field: weight}).norms[step] for weight in (1e6, 1e7))
        assert heavy == approx(10 * light, rel=0.01)

    return check


def joins_the_loss(field: str, runs: Runs) -> None:
    plain, wide = runs({field: "false", **EVERY_STEP}), runs({field: "true", **EVERY_STEP})
    assert [len(run.log("train/multi_topk_fvu/layers.1")) for run in (plain, wide)] == [0, 3]
    assert plain.norms[0] != approx(wide.norms[0], rel=1e-3)


def freezes_heads(field: str, runs: Runs) -> None:
    begun = {"training.init_from": runs().folder, "training.loss": "ce"}
    frozen, trained = (runs({field: value, **begun}) for value in ("false", "true"))
    assert_equal(frozen.weights(), runs().weights())
    assert not torch.equal(trained.weights()["encoder.weight"], runs().weights()["encoder.weight"])
    assert all(part.any() for run in (frozen, trained) for part in run.lora.values())


def may_not_overwrite_unless_told(field: str, runs: Runs) -> None:
    runs.inside("twice", {})
    (runs.root / "twice" / "notes.txt").write_text("mine")
    again = {"heads.hookpoints": "layers.0"}
    assert "holds another run" in runs.inside("twice", again | {field: "false"}).refusal
    assert runs.inside("twice", again | {field: "true"}).names == ["layers.0"]
    assert (runs.root / "twice" / "notes.txt").read_text() == "mine"


def goes_on(field: str, runs: Runs) -> None:
    every_step = EVERY_STEP | {"training.save_steps": 1}
    runs.inside("parts", every_step | {"training.max_steps": 2})
    whole = every_step | {"training.max_steps": 3}
    assert "--training.resume_from_checkpoint true to go on" in runs.inside("parts", whole | {field: "false"}).refusal
    resumed = runs.inside("parts", whole | {field: "true"})
    assert resumed.log("step") == [1, 2, 3] and len(resumed.norms) == 1
    assert_equal(resumed.weights(), runs().weights())
    earlier = runs.inside("other", whole | {field: runs.root / "parts" / "checkpoint-1"})
    assert len(earlier.norms) == 2
    assert_equal(earlier.weights(), runs().weights())


def lets_a_run_go_on_with_changes(field: str, runs: Runs) -> None:
    changed = EVERY_STEP | {"training.resume_from_checkpoint": "true", "heads.k": 6, "training.max_steps": 4}
    runs.inside("allowed", EVERY_STEP)
    assert "heads.k 4, this run has 6" in str(runs.inside("allowed", changed).refusal)
    assert runs.inside("allowed", changed | {field: "heads.k"}).config("k") == 6


def does_nothing_alone(field: str, runs: Runs) -> None:
    assert_equal(runs({field: "true"}).weights(), runs().weights())


def begins_from_heads(field: str, runs: Runs) -> None:
    run = runs({field: runs().folder, **STILL})
    torch.testing.assert_close(run.weights(), runs().weights(), rtol=0, atol=1e-6)
    assert str(runs().folder) in run.out


def has_a_default_for_each_optimizer(field: str, runs: Runs) -> None:
    size = math.sqrt(96 / 2**14)
    rates = {"signum": 5e-3 / size, "adam": 2e-4 / size, "adam8bit": 2e-4 / size, "muon": 2e-3}
    for optim, expected in rates.items():
        assert runs({"training.optim": optim, **CONSTANT}).rates == [approx(expected)]


def seeds_the_rest(field: str, runs: Runs) -> None:
    short = COUNTING | STILL | {"data.max_examples": 16, "training.max_steps": 4}
    first, second = (runs({field: seed, **short}) for seed in (42, 43))
    assert first.sequences[:16] == second.sequences[:16] and first.sequences[16:] != second.sequences[16:]
    assert sorted(first.sequences[16:]) == sorted(second.sequences[16:])
    torch.testing.assert_close(first.weights(), second.weights(), rtol=0, atol=1e-6)
    first, second = (runs({field: seed, **LORA}).lora for seed in (42, 43))
    assert not torch.allclose(first["layers.2.mlp.up_proj.lora_A"], second["layers.2.mlp.up_proj.lora_A"])


def keeps_the_best(field: str, runs: Runs) -> None:
    # At this learning rate the heads soon get worse.
    every_step = {"training.eval_steps": 1, "training.save_steps": 1, "training.learning_rate": 0.1}
    run = runs({field: "true", "training.optim": "adam", **CONSTANT, **every_step, **LOGS})
    for name in run.names:
        best = min(run.events(f"eval/fvu/{name}"), key=lambda event: event.value).step
        assert best < 3
        assert_equal(run.weights(f"best/{name}"), run.weights(f"checkpoint-{best}/{name}"))
    assert not (runs({field: "false", **LOGS}).folder / "best").exists()


def makes_the_repo_first(field: str, runs: Runs) -> None:
    run = runs({field: "true", "model.name_or_path": "large"})
    assert run.refusal is not None and list(run.hub.files(run.repo)) == [".gitattributes"]

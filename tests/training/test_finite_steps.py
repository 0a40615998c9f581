"""Tokens that are not finite train nothing, and steps that are not finite are not taken."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import assert_equal, tiny_llama, tiny_tokens, tiny_trainer, weights, whole_and_resumed
from torch.utils._python_dispatch import TorchDispatchMode

from sae_accel.common.errors import NotFinite
from sae_accel.recipe.arguments import HeadArguments


BAD = 100


def lm_with_bad_token(value: float = math.nan):
    """An LM that gives, for token `BAD`, an activation that is not finite, and never gives one for another token."""
    lm = tiny_llama()
    # Without attention, no token hears of another.
    for layer in lm.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.self_attn.forward = lambda hidden_states, **kwargs: (torch.zeros_like(hidden_states), None)
    lm.model.embed_tokens.weight.data[BAD] = value
    return lm


def rows_with(*places: tuple[int, int], rows: int = 64) -> Dataset:
    """Sequences in which token `BAD` stands at these rows and columns alone."""
    ids = torch.tensor(tiny_tokens(rows)["input_ids"]).clamp_max(BAD - 1)
    for row, column in places:
        ids[row, column] = BAD
    return Dataset.from_dict({"input_ids": ids.tolist()})


def trained(folder, lm, data, **changes):
    heads = changes.pop("heads", None)
    trainer = tiny_trainer(folder, heads, lm=lm, train=data, max_steps=4, logging_steps=1, **changes)
    trainer.train()
    return trainer


WAYS = {
    **{optim: {"optim": optim} for optim in ("signum", "adam", "adam8bit", "muon")},
    **{
        activation: {"heads": [HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4, activation=activation)]}
        for activation in ("groupmax", "batchtopk", "jumprelu")
    },
    "transcoder": {"heads": [HeadArguments(hookpoints="layers.1.mlp", type="transcoder", k=4, expansion_factor=4)]},
    "accumulation": {"gradient_accumulation_steps": 2, "micro_batches": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_token_that_is_not_finite_trains_as_one_that_is_excluded(tmp_path, way, value):
    # Of the first batch, from which biases start, and of a later one.
    data = rows_with((0, 3), (9, 0))
    options = {"max_non_finite": 0.1, "lr_scheduler_type": "constant", **WAYS[way]}
    found = trained(tmp_path / "found", lm_with_bad_token(value), data, **options)
    told = trained(tmp_path / "told", lm_with_bad_token(), data, exclude_tokens=[BAD], **options)
    assert_equal(weights(found), weights(told))
    assert found.state.log_history[-1]["train/non_finite_tokens"] == 2
    assert told.state.log_history[-1]["train/non_finite_tokens"] == 0
    assert found.state.num_input_tokens_seen == told.state.num_input_tokens_seen


@pytest.mark.parametrize("optim", ["signum", "adam", "adam8bit", "muon"])
def test_a_step_with_too_many_tokens_that_are_not_finite_is_as_if_it_had_not_been(tmp_path, optim):
    heads = [
        HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4, activation=kind, name=kind)
        for kind in ("batchtopk", "jumprelu")
    ]
    # All of the third batch, of four sequences.
    bad = rows_with(*((row, column) for row in range(8, 12) for column in range(16)), rows=20)
    good = Dataset.from_dict({"input_ids": [row for i, row in enumerate(bad["input_ids"]) if not 8 <= i < 12]})
    options = {"optim": optim, "lr_scheduler_type": "constant", "heads": heads}
    passed = tiny_trainer(tmp_path / "passed", lm=lm_with_bad_token(), train=bad, max_steps=5, **options)
    passed.train()
    never = tiny_trainer(tmp_path / "never", lm=lm_with_bad_token(), train=good, max_steps=4, **options)
    never.train()
    assert (passed.state.global_step, never.state.global_step) == (5, 4)
    assert_equal(weights(passed), weights(never))
    assert_equal(passed.tokens_since_fired, never.tokens_since_fired)
    assert passed.state.log_history[-1]["train/skipped_steps"] == 1
    assert "train/skipped_steps" not in never.state.log_history[-1]


def test_a_run_with_passed_over_steps_resumes_bit_for_bit(tmp_path):
    bad = rows_with(*((row, column) for row in range(8, 12) for column in range(16)), rows=48)
    whole, resumed = whole_and_resumed(
        tmp_path,
        lambda folder, **kwargs: tiny_trainer(
            folder, lm=lm_with_bad_token(), train=bad, max_steps=8, save_steps=4, optim="adam", **kwargs
        ),
    )
    assert_equal(weights(whole), weights(resumed))
    assert resumed.run_state.skips == whole.run_state.skips
    assert whole.run_state.skips.steps == 1


def test_ten_such_steps_in_a_row_end_the_run_with_the_place_and_the_checkpoint(tmp_path):
    bad = rows_with(*((row, column) for row in range(8, 64) for column in range(16)))
    trainer = tiny_trainer(tmp_path, lm=lm_with_bad_token(), train=bad, save_steps=2)
    with pytest.raises(NotFinite, match=r"^Step 12: 10 optimizer steps .*layers\.1.*float32.*checkpoint-10"):
        trainer.train()
    assert "layers.1" not in {path.name for path in tmp_path.iterdir()}


def test_float16_that_overflows_is_told_of_bfloat16(tmp_path):
    lm = lm_with_bad_token(6e4).half()
    for layer in lm.model.layers:
        layer.mlp.forward = lambda hidden: torch.full_like(hidden, 6e4)
    data = rows_with(*((row, column) for row in range(64) for column in range(16)))
    with pytest.raises(NotFinite, match=r"layers\.1.*float16.*model\.dtype bfloat16"):
        tiny_trainer(tmp_path, lm=lm, train=data).train()


@pytest.mark.parametrize("optim", ["adam", "muon", "signum"])
def test_a_learning_rate_beyond_all_bounds_ends_the_run_with_its_value(tmp_path, optim):
    with pytest.raises(NotFinite, match=r"learning rate.*1e\+30"):
        tiny_trainer(tmp_path, optim=optim, learning_rate=1e30, lr_scheduler_type="constant", max_steps=40).train()


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("fvu_weight", [0.0, 1.0])
def test_end_to_end_losses_leave_out_sequences_that_are_not_finite(tmp_path, loss, fvu_weight):
    # A real LM, in which a token makes NaN of its whole sequence.
    lm = tiny_llama()
    lm.model.embed_tokens.weight.data[BAD] = math.nan
    bad, good = rows_with((1, 5), rows=4), rows_with(rows=4)
    good = Dataset.from_dict({"input_ids": [row for i, row in enumerate(good["input_ids"]) if i != 1]})
    found = {}
    for name, data, batch in (("bad", bad, 4), ("good", good, 3)):
        trainer = tiny_trainer(
            tmp_path / name,
            [HeadArguments(hookpoints="layers.[02]", k=4, expansion_factor=4)],
            lm=lm,
            train=data,
            held_out=data,
            loss=loss,
            fvu_weight=fvu_weight,
            per_device_train_batch_size=batch,
            max_steps=1,
            logging_steps=1,
            max_non_finite=0.5,
            optim="adam",
            warmup_steps=0,
            learning_rate=1e-3,
        )
        trainer.train()
        found[name] = trainer
    for name, weight in weights(found["good"]).items():
        torch.testing.assert_close(weights(found["bad"])[name], weight, rtol=1e-4, atol=1e-5)
    for key, value in found["good"].metrics.items():
        if key.startswith(("eval/", "initial/")):
            assert found["bad"].metrics[key] == pytest.approx(value, rel=1e-3), key
    assert found["bad"].metrics["eval/non_finite_tokens"] == 16
    assert found["bad"].state.log_history[-1]["train/non_finite_tokens"] == 16
    assert found["bad"].state.log_history[-1][f"train/{loss}"] == pytest.approx(
        found["good"].state.log_history[-1][f"train/{loss}"], rel=1e-4
    )


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_thresholds_come_from_batches_in_which_some_token_trains(tmp_path, activation):
    heads = [HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4, activation=activation)]
    # All of the first batch, and of the two of the second step.
    bad = rows_with(*((row, column) for row in (*range(4), *range(8, 16)) for column in range(16)), rows=16)
    options = {"max_non_finite": 1.0, "gradient_accumulation_steps": 2, "warmup_steps": 0, "learning_rate": 1e-9}
    thresholds = []
    for steps in (1, 2):
        trainer = tiny_trainer(
            tmp_path / str(steps), heads, lm=lm_with_bad_token(), train=bad, optim="adam", max_steps=steps, **options
        )
        trainer.train()
        thresholds.append(trainer.heads["layers.1"].threshold.detach().clone())
    assert (thresholds[0] > 0).all()
    torch.testing.assert_close(*thresholds, rtol=1e-5, atol=0)


def test_a_run_none_of_whose_activations_are_finite_ends_before_it_begins(tmp_path):
    bad = rows_with(*((row, column) for row in range(64) for column in range(16)))
    with pytest.raises(NotFinite, match=r"^No activation at layers\.1 is finite"):
        tiny_trainer(tmp_path, lm=lm_with_bad_token(), train=bad).train()


class _Waits(TorchDispatchMode):
    """Counts where the host needs a number that the device has yet to compute."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("loss", "fvu_weight"), [("fvu", 0.0), ("ce", 0.0), ("kl", 0.5)])
def test_where_all_is_finite_the_host_waits_no_more_than_without_checks(tmp_path, monkeypatch, loss, fvu_weight):
    trainer = tiny_trainer(tmp_path, loss=loss, fvu_weight=fvu_weight, micro_batches=2)
    window = [{"input_ids": torch.tensor(tiny_tokens(4)["input_ids"]), "attention_mask": torch.ones(4, 16).long()}] * 3
    k = {name: head.config.k for name, head in trainer.heads.items()}

    def waits(careful: bool) -> int:
        with _Waits() as waits:
            trainer.objective.gradients(trainer.bank, window, k, {}, careful)
        return waits.count

    with_checks, with_care = waits(False), waits(True)
    monkeypatch.setattr(
        "sae_accel.activations.trained_rows.surely_finite", lambda rows: torch.ones(len(rows), dtype=torch.bool)
    )
    assert with_checks == waits(False) < with_care


def test_numbers_are_looked_at_one_by_one_only_around_a_step_that_has_bad_ones(tmp_path, monkeypatch):
    trainer = tiny_trainer(
        tmp_path, lm=lm_with_bad_token(), train=rows_with((9, 0)), max_steps=6, max_non_finite=0.1, logging_steps=1
    )
    real, calls = trainer.objective.gradients, []

    def gradients(bank, window, k, dead_masks, careful):
        calls.append((trainer.state.global_step, careful))
        return real(bank, window, k, dead_masks, careful)

    monkeypatch.setattr(trainer.objective, "gradients", gradients)
    trainer.train()
    # Row 9 is of the third batch; the fourth is made with care at once, as its numbers might have been bad too.
    assert calls == [(0, False), (1, False), (2, False), (2, True), (3, True), (4, False), (5, False)]


@pytest.mark.parametrize(("scale", "in_a_row"), [(65_536.0, 0), (1.0, 1)])
def test_an_overflow_that_float16s_scaler_makes_is_no_failure(tmp_path, scale, in_a_row):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    window = [{"input_ids": torch.tensor(tiny_tokens(4)["input_ids"]), "attention_mask": torch.ones(4, 16).long()}]
    k = {name: head.config.k for name, head in trainer.heads.items()}
    result = trainer.objective.gradients(trainer.bank, window, k, {})
    next(trainer.bank.parameters()).grad.fill_(math.inf)
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale)
    verdict = trainer.finite_steps.judge(result, trainer.optimizer)
    assert not verdict.taken and verdict.overflows and verdict.is_sure
    assert (trainer.run_state.skips.in_a_row, trainer.run_state.skips.steps) == (in_a_row, 1)

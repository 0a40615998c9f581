import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from safetensors.torch import load_file
from tiny import (
    VOCAB,
    Course,
    Stop,
    assert_equal,
    command_words,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_tokens,
    tiny_trainer,
    weights,
    whole_and_resumed,
)
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from sae_accel.common.errors import InputError
from sae_accel.loading.auto import AutoSae
from sae_accel.models import Latents, SaeModel
from sae_accel.ops.metrics import fvu
from sae_accel.recipe.arguments import HeadArguments
from sae_accel.recipe.command_line import parse_command_line
from sae_accel.training.run import run


HEADS = [
    HeadArguments(hookpoints="layers.[12]", k=4, expansion_factor=4, auxk_alpha=1 / 32, dead_after_tokens=200),
    HeadArguments(hookpoints="layers.1.mlp", type="transcoder", skip_connection=True, k=4, expansion_factor=4),
    HeadArguments(hookpoints="layers.1", name="wide", k=3, expansion_factor=8, multi_topk=True, k_decay_steps=8),
]


class _Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("optim", ["signum", "adam", "adam8bit", "muon"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_killed_run_that_resumes_ends_bit_for_bit_like_one_that_never_stopped(tmp_path, optim, accumulate):
    options = dict(
        heads=HEADS,
        optim=optim,
        max_steps=20,
        gradient_accumulation_steps=accumulate,
        save_steps=5,
        logging_steps=4,
        micro_batches=2,
    )
    whole, resumed = whole_and_resumed(tmp_path, lambda folder, **more: tiny_trainer(folder, **options, **more), 13)
    assert_equal(weights(whole), weights(resumed))
    assert all(torch.equal(whole.tokens_since_fired[n], resumed.tokens_since_fired[n]) for n in whole.heads)
    assert whole.state.num_input_tokens_seen == resumed.state.num_input_tokens_seen
    # A log covers what came before the kill as well.
    assert whole.state.log_history == resumed.state.log_history
    assert all(torch.equal(whole.counters.frequencies[n], resumed.counters.frequencies[n]) for n in whole.heads)


def test_a_streamed_run_resumes_bit_for_bit_and_into_a_second_pass(tmp_path):
    def stream():
        return tiny_tokens(40).to_iterable_dataset().shuffle(seed=3, buffer_size=16)

    whole = tiny_trainer(tmp_path / "whole", train=stream(), max_steps=14)
    whole.train()
    with pytest.raises(SystemExit):
        tiny_trainer(tmp_path / "parts", train=stream(), max_steps=14, save_steps=12, callbacks=[Stop(13)]).train()
    resumed = tiny_trainer(tmp_path / "parts", train=stream(), max_steps=14)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-12"))
    assert_equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("make", [tiny_tokens, lambda: tiny_tokens().to_iterable_dataset()], ids=["rows", "stream"])
def test_a_callback_of_a_resumed_run_draws_what_it_would_have_drawn(tmp_path, make):
    class Draw(TrainerCallback):
        def __init__(self):
            self.drawn = {}

        def on_step_end(self, args, state, control, **kwargs):
            self.drawn[state.global_step] = (random.random(), np.random.random(), torch.rand(()).item())

    def run(folder, *callbacks, **resume):
        options = dict(train=make(), max_steps=8, save_steps=2)
        tiny_trainer(tmp_path / folder, callbacks=list(callbacks), **options).train(**resume)

    whole, resumed = Draw(), Draw()
    run("whole", whole)
    with pytest.raises(SystemExit):
        run("parts", Draw(), Stop(5))
    run("parts", resumed, resume_from_checkpoint=True)
    assert list(resumed.drawn) == [5, 6, 7, 8]
    assert all(resumed.drawn[step] == whole.drawn[step] for step in resumed.drawn)


@pytest.mark.parametrize("optim", ["adam", "muon"])
def test_accumulated_batches_and_micro_batches_equal_one_large_batch(tmp_path, optim):
    def trained(name, **kwargs):
        trainer = tiny_trainer(tmp_path / name, heads=HEADS[:1], optim=optim, warmup_steps=0, max_steps=3, **kwargs)
        trainer.train()
        return weights(trainer)

    start = weights(tiny_trainer("unused", heads=HEADS[:1]))
    large = trained("large", per_device_train_batch_size=8)
    for kwargs in (
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
        dict(per_device_train_batch_size=8, micro_batches=5),
    ):
        parts = trained(str(kwargs), **kwargs)
        for name in large:
            # Adam and Muon turn the rounding of a gradient near zero into a step of full size, in a few entries.
            assert (parts[name] - large[name]).norm() < 0.05 * (large[name] - start[name]).norm(), name


def test_gradients_are_those_of_the_fvu_of_the_whole_window(tmp_path):
    lm, data = tiny_llama(), tiny_tokens(8)
    trainer = tiny_trainer(tmp_path, lm=lm, train=data, heads=[HeadArguments(hookpoints="layers.1", k=4)], max_steps=1)
    head = trainer.heads["layers.1"]
    ids = torch.tensor(data["input_ids"])
    with torch.no_grad():
        hidden = lm(ids, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.b_dec)
    expected = torch.autograd.grad(fvu(hidden, head(hidden).reconstruction), list(head.parameters()))
    seen = {}

    class Optimizer:
        param_groups = []

        def step(self):
            seen.update({name: parameter.grad.clone() for name, parameter in head.named_parameters()})

        def zero_grad(self):
            pass

    trainer.optimizer = trainer.lr_scheduler = trainer.run_state.optimizer = Optimizer()
    batch = torch.ones_like(ids)
    trainer.training_step([{"input_ids": ids[i : i + 2], "attention_mask": batch[i : i + 2]} for i in (0, 2, 4, 6)])
    scale = trainer.objective.scale["layers.1"]
    for (name, _), gradient in zip(head.named_parameters(), expected, strict=True):
        torch.testing.assert_close(seen[name] * scale, gradient, rtol=1e-4, atol=1e-6)


def test_one_heads_update_does_not_depend_on_another_head(tmp_path):
    alone = tiny_trainer(tmp_path / "a", heads=HEADS[1:2], max_steps=8, max_grad_norm=0.1)
    together = tiny_trainer(tmp_path / "b", heads=HEADS, max_steps=8, max_grad_norm=0.1)
    alone.train(), together.train()
    assert_equal(alone.heads["layers.1.mlp"].state_dict(), together.heads["layers.1.mlp"].state_dict())


@pytest.mark.parametrize("loss", [{}, {"training.loss": "ce", "training.fvu_weight": 1}], ids=["fvu", "ce"])
@pytest.mark.parametrize(
    ("field", "values", "others", "reached"),
    [
        (
            "heads.auxk_alpha",
            (0, 0.25, 0.75),
            # From the second step on there are dead latents.
            {"heads.dead_after_tokens": 1, "training.max_steps": 2},
            {"encoder.weight", "encoder.bias", "W_dec"},
        ),
        (
            "heads.sparsity_weight",
            (1, 2, 4),
            {"heads.activation": "jumprelu", "training.max_steps": 1},
            {"threshold"},
        ),
    ],
)
def test_gradients_are_linear_in_the_weights_that_a_recipe_gives_to_losses(
    place, tmp_path, field, values, others, reached, loss
):
    moments = []
    for value in values:
        words = {"heads.hookpoints": "layers.1", "training.optim": "adam", field: value} | others | loss
        words["training.output_dir"] = tmp_path / str(value)
        trainer = run(parse_command_line(command_words(place, tmp_path, **words)))
        state = trainer.optimizer.state
        moments.append({name: state[p]["exp_avg"] for name, p in trainer.heads["layers.1"].named_parameters()})
    moved = []
    for name in moments[0]:
        less, more = (moments[i][name] - moments[0][name] for i in (1, 2))
        torch.testing.assert_close(more, 3 * less, rtol=1e-3, atol=1e-3 * more.abs().max().item())
        moved += [name] if less.abs().max() > 1e-5 else []
    assert set(moved) >= reached


def test_logged_values_are_means_over_exactly_the_steps_since_the_last_log(tmp_path):
    every, some = _Logs(), _Logs()
    tiny_trainer(tmp_path / "a", max_steps=7, logging_steps=1, callbacks=[every]).train()
    tiny_trainer(tmp_path / "b", max_steps=7, logging_steps=3, callbacks=[some]).train()
    key = "train/fvu/layers.1"
    single = [log[key] for log in every.logs]
    assert [log[key] for log in some.logs] == pytest.approx(
        [sum(single[0:3]) / 3, sum(single[3:6]) / 3, single[6]], rel=1e-5
    )
    assert single[0] != pytest.approx(single[6], rel=1e-3)


def test_logs_tell_how_many_latents_are_active_and_the_run_how_often_each_was_since_the_last_log(tmp_path):
    lm, data, course, logs = tiny_llama(), tiny_tokens(), Course(), _Logs()
    # More than are ever above zero, so that tokens differ in how many they use.
    heads = [HeadArguments(hookpoints="layers.1", k=90, expansion_factor=4)]
    options = dict(gradient_accumulation_steps=2, micro_batches=3, max_steps=4, logging_steps=2)
    trainer = tiny_trainer(tmp_path, heads=heads, lm=lm, train=data, callbacks=[course, logs], **options)
    trainer.train()
    frequencies = []
    for i, before in enumerate(course.weights[:4]):
        head = SaeModel(trainer.heads["layers.1"].config)
        head.load_state_dict({name.removeprefix("heads.layers:1."): value for name, value in before.items()})
        with torch.no_grad():
            hidden = lm(torch.tensor(data[8 * i : 8 * i + 8]["input_ids"]), output_hidden_states=True).hidden_states[2]
        dense = head.encode(hidden.flatten(0, 1)).to_dense(head.num_latents)
        frequencies.append((dense > 0).float().mean(0))
    two_steps = [(frequencies[i] + frequencies[i + 1]) / 2 for i in (0, 2)]
    expected = [frequency.sum().item() for frequency in two_steps]
    assert [log["train/l0/layers.1"] for log in logs.logs] == pytest.approx(expected, rel=1e-4)
    assert max(expected) < 85, "a weak test"
    saved = load_file(tmp_path / "latent_frequency.safetensors")["layers.1"]
    torch.testing.assert_close(saved, two_steps[1], rtol=0, atol=1e-2)


def test_a_checkpoint_holds_as_many_steps_as_its_name_says(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=7, save_steps=3, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
    three = tiny_trainer(tmp_path / "three", max_steps=6)
    three.train()
    assert torch.equal(
        AutoSae.from_pretrained(tmp_path / "checkpoint-6")["layers.1"].W_dec,
        AutoSae.from_pretrained(tmp_path / "three")["layers.1"].W_dec,
    )


def test_k_decays_while_training_but_is_saved_as_the_recipe_says(tmp_path):
    logs = _Logs()
    heads = [HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4, activation="groupmax", k_decay_steps=6)]
    tiny_trainer(tmp_path, heads=heads, max_steps=8, save_steps=2, logging_steps=1, callbacks=[logs]).train()
    ks = [log["train/k/layers.1"] for log in logs.logs]
    assert ks[0] == 96 and ks[-1] == 4 and ks == sorted(ks, reverse=True) and len(set(ks)) > 3
    assert AutoSae.from_pretrained(tmp_path / "checkpoint-2").config.k == 4


def test_what_is_saved_is_what_was_evaluated_with_decoder_rows_of_unit_norm(tmp_path):
    held_out = tiny_tokens(12, seed=5)
    lm = tiny_llama()
    for optim in ("signum", "adam"):
        trainer = tiny_trainer(tmp_path / optim, lm=lm, held_out=held_out, optim=optim, max_steps=9)
        metrics = trainer.train().metrics
        sae = AutoSae.from_pretrained(tmp_path / optim, hookpoint="layers.2")
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(96))
        with torch.no_grad():
            hidden = lm(torch.tensor(held_out["input_ids"]), output_hidden_states=True).hidden_states[3].flatten(0, 1)
            output = sae(hidden)
        assert metrics["eval/fvu/layers.2"] == pytest.approx(fvu(hidden, output.reconstruction).item(), rel=1e-4)
        assert metrics["eval/l0/layers.2"] == pytest.approx((output.top_acts > 0).sum(-1).float().mean().item())
        assert json.loads((tmp_path / optim / "metrics.json").read_text()) == metrics
        dense = Latents(output.top_acts, output.top_indices).to_dense(96)
        saved = load_file(tmp_path / optim / "latent_frequency.safetensors")["layers.2"]
        torch.testing.assert_close(saved, (dense > 0).float().mean(0))


def test_evaluation_and_saving_do_not_change_the_course_of_training(tmp_path):
    plain = tiny_trainer(tmp_path / "a", max_steps=8)
    busy = tiny_trainer(tmp_path / "b", max_steps=8, save_steps=2, eval_steps=1, held_out=tiny_tokens(8, seed=4))
    plain.train(), busy.train()
    assert_equal(weights(plain), weights(busy))


def test_latents_are_dead_after_tokens_not_steps_and_zeros_do_not_count_as_activity(tmp_path):
    logs, heads = _Logs(), [HeadArguments(hookpoints="layers.1", k=90, expansion_factor=4, dead_after_tokens=150)]
    trainer = tiny_trainer(tmp_path, heads=heads, max_steps=3, logging_steps=1, callbacks=[logs])
    with torch.no_grad():
        trainer.heads["layers.1"].encoder.weight[:10] = 0
        trainer.heads["layers.1"].encoder.bias[:10] = -1
    # Steps of 64 tokens; biases are set before the first step, so the ten are held down again.
    trainer.bank.heads["layers:1"].initialize_biases = lambda *_: None
    trainer.train()
    assert trainer.tokens_since_fired["layers.1"][:10].tolist() == [192] * 10
    dead = trainer.tokens_since_fired["layers.1"] > 150
    assert trainer.dead_fractions()["layers.1"] == pytest.approx(dead.float().mean().item()) and not dead.all()
    assert [log["train/dead/layers.1"] for log in logs.logs] == [0, 0, trainer.dead_fractions()["layers.1"]]
    trainer.plans["layers.1"].arguments.dead_after_tokens = 192
    assert trainer.dead_fractions()["layers.1"] == 0, "only more tokens than that are too many"


# Signs of gradients hide what is no number, and Adam's moments keep it.
@pytest.mark.parametrize(("optim", "activation"), [("signum", "topk"), ("adam", "topk"), ("adam", "batchtopk")])
def test_excluded_tokens_train_nothing_even_if_they_fill_the_first_batch(tmp_path, optim, activation):
    data = tiny_tokens(32)
    rows = torch.tensor(data["input_ids"])
    rows[:4] = 7
    data = Dataset.from_dict({"input_ids": rows.tolist()})
    heads = [HeadArguments(hookpoints="layers.[12]", k=4, expansion_factor=4, activation=activation)]
    options = dict(heads=heads, optim=optim, exclude_tokens=[7])
    trainer = tiny_trainer(tmp_path, train=data, max_steps=4, **options)
    trainer.train()
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert trainer.state.num_input_tokens_seen == int((rows[:16] != 7).sum())
    nothing = Dataset.from_dict({"input_ids": [[7] * 16] * 32})
    with pytest.raises(InputError, match="No token of the training data trains"):
        tiny_trainer(tmp_path / "b", train=nothing, **options).train()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_measured_as_float64_would(tmp_path, dtype):
    lm, data, course = tiny_llama(dtype=dtype), tiny_tokens(8), Course()
    with torch.no_grad():
        # With a mean beside which they vary little, and squares that sum up to more than float16 can hold.
        lm.model.embed_tokens.weight.mul_(2000).add_(200)
    options = dict(lm=lm, train=data, held_out=data, optim="adam", learning_rate=1e-2, warmup_steps=0)
    trainer = tiny_trainer(tmp_path, max_steps=2, logging_steps=1, callbacks=[course], **options)
    metrics = trainer.train().metrics

    def fvu_of(weights, tokens):
        prefix = "heads.layers:1."
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        head = SaeModel(trainer.heads["layers.1"].config)
        head.load_state_dict(state)
        with torch.no_grad():
            x = lm(torch.tensor(tokens), output_hidden_states=True).hidden_states[2].flatten(0, 1).double()
            error = (x - head.double()(x).reconstruction).pow(2).sum()
        return (error / (x - x.mean(0)).pow(2).sum()).item()

    expected = [fvu_of(course.weights[i], data[4 * i : 4 * i + 4]["input_ids"]) for i in range(2)]
    logged = [log["train/fvu/layers.1"] for log in trainer.state.log_history]
    assert logged == pytest.approx(expected, rel=1e-4)
    assert metrics["eval/fvu/layers.1"] == pytest.approx(fvu_of(course.weights[-1], data["input_ids"]), rel=1e-4)
    assert expected[1] < expected[0] < 2


@pytest.fixture
def precision(monkeypatch):
    """Sets what Accelerate runs in, as its launcher would."""

    def choose(name):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
        AcceleratorState._reset_state()
        GradientState._reset_state()

    yield choose
    choose("no")


@pytest.mark.parametrize("loss", ["fvu", "ce", "kl"])
def test_autocast_is_for_the_heads_and_not_for_the_lm(tmp_path, precision, loss):
    before, acts = {}, {}
    for name in ("no", "bf16"):
        precision(name)
        lm, before[name], acts[name] = tiny_llama(), [], []

        def keep(module, args, output, seen=before[name]):
            seen.append(output.clone())

        def again(module, args, kwargs, output):
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(module.forward(*args, **kwargs), output)

        # What comes behind a head depends on its precision, so there each module is run again on what it was given.
        for module in lm.model.layers[:2]:
            module.register_forward_hook(keep)
        for module in (*lm.model.layers[2:], lm.model.norm, lm.lm_head):
            module.register_forward_hook(again, with_kwargs=True)
        heads = [HeadArguments(hookpoints="layers.1", k=4, expansion_factor=4)]
        trainer = tiny_trainer(tmp_path / name, heads, lm=lm, max_steps=2, loss=loss, held_out=tiny_tokens(4, seed=2))
        head = trainer.heads["layers.1"]
        head.register_forward_hook(lambda module, args, output, seen=acts[name]: seen.append(output.top_acts.detach()))
        trainer.train()
    assert len(before["no"]) == len(before["bf16"]) > 6
    assert all(torch.equal(plain, mixed) for plain, mixed in zip(before["no"], before["bf16"], strict=True))
    assert all(torch.equal(values, values.bfloat16().float()) for values in acts["bf16"])
    assert not any(torch.equal(values, values.bfloat16().float()) for values in acts["no"])


@pytest.mark.parametrize(
    ("make", "pattern"), [(tiny_gpt2, "h.*.attn"), (tiny_gpt2, "h.1.mlp.act"), (tiny_bert, "encoder.layer.[01]")]
)
def test_decoder_and_encoder_lms_with_padded_rows_train(tmp_path, make, pattern):
    rows = [{"input_ids": list(range(3, 3 + length))} for length in (16, 9, 12, 16) * 6]
    logs = _Logs()
    heads = [HeadArguments(hookpoints=pattern, k=4, expansion_factor=4)]
    trainer = tiny_trainer(
        tmp_path, lm=make(), heads=heads, train=rows, max_steps=12, logging_steps=1, optim="adam", learning_rate=1e-3,
        warmup_steps=0, callbacks=[logs],
    )  # fmt: skip
    trainer.train()
    fvus = [[value for key, value in log.items() if "fvu" in key][0] for log in logs.logs]
    assert fvus[-1] < 0.95 * fvus[0]
    assert trainer.state.num_input_tokens_seen == 12 * (16 + 9 + 12 + 16)


def test_learning_rates_are_by_head_and_schedules_count_optimizer_steps(tmp_path):
    logs = _Logs()
    heads = [HeadArguments(layers=[0], k=4), HeadArguments(layers=[1], k=4, learning_rate=0.5)]
    tiny_trainer(
        tmp_path, heads=heads, optim="adam", warmup_steps=2, max_steps=6, gradient_accumulation_steps=3,
        logging_steps=1, callbacks=[logs],
    ).train()  # fmt: skip
    # After step n the rate is that of step n + 1: up to the base in 2 steps, down to zero in 4.
    factors = [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert [log["learning_rate/layers.1"] for log in logs.logs] == pytest.approx([0.5 * f for f in factors])
    base = 2e-4 / (24 * 32 / 2**14) ** 0.5
    assert [log["learning_rate/layers.0"] for log in logs.logs] == pytest.approx([base * f for f in factors])


def test_a_partial_last_window_is_a_step_too(tmp_path):
    trainer = tiny_trainer(tmp_path, train=tiny_tokens(40), gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == 3
    assert trainer.state.num_input_tokens_seen == 40 * 16


def test_max_tokens_is_rounded_up_to_whole_steps(tmp_path):
    trainer = tiny_trainer(tmp_path, max_tokens=130, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_callbacks_of_transformers_see_and_steer_the_run(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(("begin", state.max_steps, kwargs["model"] is not None, kwargs["optimizer"] is not None))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                control.should_training_stop = True
                control.should_save = True
            return control

        def on_save(self, args, state, control, **kwargs):
            seen.append(("save", state.global_step))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(("evaluate", metrics["eval/tokens"]))

    trainer = tiny_trainer(tmp_path, max_steps=9, held_out=tiny_tokens(4, seed=2))
    trainer.add_callback(Watch)
    trainer.train()
    assert seen == [("begin", 9, True, True), ("save", 3), ("evaluate", 64)]


def test_ctrl_c_ends_the_step_saves_and_can_be_resumed(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    whole = tiny_trainer(tmp_path / "whole", max_steps=8)
    whole.train()
    with pytest.raises(KeyboardInterrupt, match="checkpoint-4"):
        tiny_trainer(tmp_path / "parts", max_steps=8, callbacks=[Interrupt()]).train()
    resumed = tiny_trainer(tmp_path / "parts", max_steps=8, resume_from_checkpoint=True)
    resumed.train()
    assert_equal(weights(whole), weights(resumed))


def test_a_run_does_not_overwrite_another_unless_told_to(tmp_path):
    tiny_trainer(tmp_path, max_steps=2, save_steps=1).train()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds another run"):
        tiny_trainer(tmp_path, max_steps=1).train()
    tiny_trainer(tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "training_state.pt is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "training_state.pt has .* of .* bytes"),
    ],
)
def test_a_checkpoint_that_is_cut_short_is_refused_and_passed_over(tmp_path, damage, message):
    tiny_trainer(tmp_path, max_steps=4, save_steps=2).train()
    damage(tmp_path / "checkpoint-4" / "training_state.pt")
    with pytest.raises(InputError, match=message):
        tiny_trainer(tmp_path, max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer = tiny_trainer(tmp_path, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5


def test_a_checkpoint_of_other_heads_or_another_optimizer_is_refused(tmp_path):
    tiny_trainer(tmp_path, max_steps=2).train()
    with pytest.raises(InputError, match="comes from another recipe"):
        tiny_trainer(tmp_path, heads=HEADS, max_steps=8).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="training.optim signum"):
        tiny_trainer(tmp_path, optim="adam", max_steps=3).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="no checkpoint folder"):
        tiny_trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_heads_at_different_hookpoints_start_differently_and_seeds_matter():
    def start(**kwargs):
        heads = [HeadArguments(hookpoints="layers.[12]", k=4, expansion_factor=4, **kwargs)]
        return {name: head.encoder.weight for name, head in tiny_trainer("unused", heads=heads).heads.items()}

    first, again, other = start(), start(), start(seed=1)
    assert torch.equal(first["layers.1"], again["layers.1"])
    assert not torch.equal(first["layers.1"], first["layers.2"])
    assert not torch.equal(first["layers.1"], other["layers.1"])


def test_too_little_data_is_refused():
    with pytest.raises(InputError, match="3 sequences, fewer than one batch of 4"):
        tiny_trainer("unused", train=tiny_tokens(3)).train()
    with pytest.raises(InputError, match="Set training.max_steps"):
        tiny_trainer("unused", train=tiny_tokens(8).to_iterable_dataset()).train()
    assert not os.path.exists("unused")


def test_a_micro_batch_bounds_what_the_heads_see_at_once(tmp_path):
    rows = []
    trainer = tiny_trainer(tmp_path, max_steps=1, micro_batches=4)
    trainer.heads["layers.1"].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    trainer.train()
    assert rows == [16, 16, 16, 16]


def test_tensorboard_logs_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_trainer(tmp_path / "run", max_steps=4, logging_steps=2, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/fvu/layers.1")] == [2, 4]


def test_a_second_pass_over_the_data_has_another_order(tmp_path):
    seen = []

    class Rows(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    tiny_trainer(tmp_path, train=Rows(tiny_tokens(16).to_list()), max_steps=8).train()
    first, second = seen[-32:-16], seen[-16:]
    assert sorted(first) == sorted(second) == list(range(16)) and first != second


def test_iterable_data_of_torch_trains_too(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            while True:
                yield {"input_ids": torch.randint(0, VOCAB, (16,), generator=generator)}

    trainer = tiny_trainer(tmp_path, train=Stream(), max_steps=3)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 3 * 64
    shutil.rmtree(tmp_path)

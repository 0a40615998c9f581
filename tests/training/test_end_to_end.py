import json

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    VOCAB,
    Course,
    assert_equal,
    tiny_gpt2,
    tiny_llama,
    tiny_tokens,
    tiny_trainer,
    trained_llama,
    weights,
    whole_and_resumed,
)
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, Gemma2Config

import sae_accel.lm.logit_loss as logit_loss
from sae_accel.common.errors import InputError
from sae_accel.lm.logit_loss import LogitLoss
from sae_accel.lm.splice import splice
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeModel
from sae_accel.recipe.arguments import HeadArguments, LoraArguments


# RMSNorm goes through float32 whatever the LM's dtype, so finite differences are taken through GPT-2.
GPT2_HEADS = [
    HeadArguments(hookpoints="h.0", k=4, expansion_factor=2),
    HeadArguments(hookpoints="h.2.mlp", type="transcoder", skip_connection=True, k=4, expansion_factor=2),
]
SAE = HeadArguments(hookpoints="layers.0", k=4, expansion_factor=2)
TRANSCODER = HeadArguments(hookpoints="layers.2.mlp", type="transcoder", skip_connection=True, k=4, expansion_factor=2)
EXCLUDED = 7


def _ragged(rows=4, ctx_len=8):
    """Sequences of different lengths, some of whose tokens are excluded."""
    ids = torch.randint(8, VOCAB, (rows, ctx_len), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = 0
    ids[0, 2] = ids[2, 0] = EXCLUDED
    return {"input_ids": ids, "attention_mask": mask}


def _double_trainer(tmp_path, heads, lm=None, **kwargs):
    """A trainer in float64 whose heads are no longer where they started, and the gradients that it takes."""
    lm = (lm or tiny_llama()).double()
    trainer = tiny_trainer(tmp_path, heads=heads, lm=lm, exclude_tokens=[EXCLUDED], max_steps=1, **kwargs)
    trainer.bank.double()
    torch.manual_seed(0)
    for parameter in trainer.bank.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return trainer


def _gradients(trainer, window):
    trainer.bank.zero_grad()
    k = {name: head.config.k for name, head in trainer.heads.items()}
    result = trainer.objective.gradients(trainer.bank, window, k, {})
    return result, {name: p.grad.clone() for name, p in trainer.bank.named_parameters() if p.grad is not None}


def _plain_losses(trainer, batch):
    """CE of the spliced and of the clean LM and KL between them, from whole logits and by hooks of its own."""
    lm, keep = trainer.objective.lm.model, batch["attention_mask"].bool() & (batch["input_ids"] != EXCLUDED)
    with torch.no_grad():
        clean = lm(**batch).logits.log_softmax(-1)
    handles = []
    for name, head in trainer.heads.items():

        def hook(module, args, output, name=name, head=head):
            new = head(args[0] if name.endswith("mlp") else output, output).reconstruction
            return torch.where(keep[..., None], new, output)

        handles.append(lm.base_model.get_submodule(name).register_forward_hook(hook))
    spliced = lm(**batch).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    pairs = keep[:, :-1] & keep[:, 1:]
    labels = batch["input_ids"][:, 1:][pairs]
    ce, ce_clean = (F.nll_loss(log_probs[:, :-1][pairs], labels) for log_probs in (spliced, clean))
    kl = (clean.exp() * (clean - spliced)).sum(-1)[keep].mean()
    return {"ce": ce, "ce_clean": ce_clean, "kl": kl}


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_of_several_heads_are_finite_differences_of_the_loss_on_the_logits(tmp_path, loss, micro_batches):
    trainer = _double_trainer(tmp_path, GPT2_HEADS, tiny_gpt2(), loss=loss, micro_batches=micro_batches)
    batch = _ragged()
    halves = [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2)]
    result, gradients = _gradients(trainer, halves)
    with torch.no_grad():
        plain = _plain_losses(trainer, batch)
        for name in ("ce", "kl", "ce_clean") if loss == "kl" else ("ce",):
            torch.testing.assert_close(result.values[f"train/{name}"].double(), plain[name], rtol=1e-6, atol=1e-7)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.bank.named_parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            start, step = parameter.clone(), 1e-5
            ends = []
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                ends.append(_plain_losses(trainer, batch)[loss])
            parameter.copy_(start)
            difference = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close((gradients[name] * direction).sum(), difference, rtol=1e-5, atol=1e-9)


def test_local_losses_join_with_their_weight_and_stay_with_their_own_head(tmp_path):
    batch = _ragged()
    gradients = {}
    for weight in (0.0, 0.5):
        trainer = _double_trainer(tmp_path / str(weight), [SAE, TRANSCODER], loss="ce", fvu_weight=weight)
        result, gradients[weight] = _gradients(trainer, [batch])
    lm, keep = trainer.objective.lm.model, batch["attention_mask"].bool() & (batch["input_ids"] != EXCLUDED)
    seen = {}
    targets = {
        "layers.0": lm.base_model.get_submodule("layers.0"),
        "layers.2.mlp": lm.base_model.get_submodule("layers.2.mlp"),
    }

    def clean_hook(name):
        return lambda module, args, output: seen.update({name: output[keep]})

    handles = [module.register_forward_hook(clean_hook(name)) for name, module in targets.items()]
    with torch.no_grad():
        lm(**batch)
    [handle.remove() for handle in handles]
    inputs = {}

    def spliced_hook(name, head):
        def hook(module, args, output):
            source = args[0] if name.endswith("mlp") else output
            inputs[name] = (source[keep].detach(), output[keep].detach())
            return torch.where(keep[..., None], head(source, output).reconstruction, output)

        return hook

    handles = [module.register_forward_hook(spliced_hook(n, trainer.heads[n])) for n, module in targets.items()]
    with torch.no_grad():
        lm(**batch)
    [handle.remove() for handle in handles]
    for name, head in trainer.heads.items():
        read, target = inputs[name]
        variance = (seen[name] - seen[name].mean(0)).pow(2).sum()
        fvu = (head(read, target).reconstruction - target).pow(2).sum() / variance
        torch.testing.assert_close(result.values[f"train/fvu/{name}"].double(), fvu.detach(), rtol=1e-6, atol=1e-8)
        expected = torch.autograd.grad(fvu, list(head.parameters()))
        for (parameter, _), own in zip(head.named_parameters(), expected, strict=True):
            key = f"heads.{name.replace('.', ':')}.{parameter}"
            # The variance is taken in float32, and the error in float64.
            torch.testing.assert_close(gradients[0.5][key] - gradients[0.0][key], 0.5 * own, rtol=1e-5, atol=1e-7)


# Of batches of four sequences, five parts leave one with nothing in it, as of a process whose data has ended.
@pytest.mark.parametrize("micro_batches", [3, 5])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_losses_of_a_window_do_not_depend_on_how_it_is_cut(tmp_path, loss, micro_batches):
    batch = _ragged(rows=8)
    lora = LoraArguments(rank=2, train_heads=True)
    trainer = _double_trainer(tmp_path, [SAE, TRANSCODER], loss=loss, fvu_weight=1.0, lora=lora)
    whole, expected = _gradients(trainer, [batch])
    assert expected.keys() == {name for name, _ in trainer.bank.named_parameters()}
    trainer.objective.local.micro_batches = micro_batches
    windows = [{key: value[i : i + 4] for key, value in batch.items()} for i in (0, 4)]
    parts, gradients = _gradients(trainer, windows)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-8)
    assert int(whole.num_tokens) == int(parts.num_tokens) == int((batch["attention_mask"].sum()) - 2)
    for name in whole.values:
        torch.testing.assert_close(parts.values[name], whole.values[name], rtol=1e-5, atol=1e-7)


def test_what_stands_at_padding_and_before_excluded_tokens_changes_nothing(tmp_path):
    batch = _ragged()
    trainer = _double_trainer(tmp_path, [SAE, TRANSCODER], loss="kl")
    result, expected = _gradients(trainer, [batch])
    batch["input_ids"][1, 5:] = 50
    again, gradients = _gradients(trainer, [batch])
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert torch.equal(again.values["train/ce"], result.values["train/ce"])


def test_logits_are_those_of_the_lm_with_its_cap_and_are_made_in_pieces(monkeypatch):
    torch.manual_seed(0)
    size = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, head_dim=6)
    config = Gemma2Config(vocab_size=VOCAB, num_key_value_heads=2, final_logit_softcapping=0.5, **size)
    lm = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    losses, batch = LogitLoss(lm), _ragged()
    hidden = losses.hidden_states(**batch).flatten(0, 1).requires_grad_()
    torch.testing.assert_close(losses.logits(hidden).view(4, 8, VOCAB), lm(**batch).logits)
    labels = batch["input_ids"].flatten()
    whole = losses(hidden, labels, hidden.detach() + 0.1)
    (expected,) = torch.autograd.grad(whole["kl"], hidden)
    sizes = []
    lm.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    monkeypatch.setattr(logit_loss, "MAX_LOGITS", 5 * VOCAB)
    pieces = losses(hidden, labels, hidden.detach() + 0.1)
    (found,) = torch.autograd.grad(3 * pieces["kl"], hidden)
    assert max(sizes) == 5 * VOCAB and len(sizes) == 14
    torch.testing.assert_close(found, 3 * expected)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name])


def test_kl_of_an_lm_from_itself_is_zero_and_ce_is_the_lms_own():
    lm, batch = tiny_llama().eval(), _ragged()
    losses = LogitLoss(lm)
    hidden = losses.hidden_states(**batch).flatten(0, 1).detach()
    labels = batch["input_ids"].roll(-1, 1).clone()
    labels[:, -1] = logit_loss.IGNORED
    found = losses(hidden, labels.flatten(), hidden)
    own = lm(**batch, labels=batch["input_ids"]).loss
    assert found["kl"].abs() < 1e-4
    torch.testing.assert_close(found["ce"] / (labels != logit_loss.IGNORED).sum(), own)
    assert torch.equal(found["ce"], found["ce_clean"])


def test_the_module_that_a_transcoder_replaces_runs_for_the_clean_lm_alone(tmp_path):
    lm = tiny_llama()
    trainer = tiny_trainer(tmp_path, heads=[TRANSCODER], lm=lm, loss="ce", max_steps=1)
    calls = []
    lm.model.layers[2].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    batch = _ragged()
    batch["attention_mask"][:] = 1
    _gradients(trainer, [batch])
    # Its first pass tells what it gives.
    assert len(calls) == 1
    _gradients(trainer, [batch, batch])
    assert len(calls) == 1


def test_training_end_to_end_lowers_the_loss_that_it_trains_by(tmp_path):
    for loss in ("ce", "kl"):
        # An LM that predicts nothing cannot be made worse, so it is trained a little first.
        lm, rows = trained_llama()
        held_out = rows.select(range(8))
        train = rows.select(range(8, 64))
        options = dict(loss=loss, max_steps=40, optim="adam", learning_rate=5e-3, eval_steps=20)
        trainer = tiny_trainer(
            tmp_path / loss, [SAE, TRANSCODER], lm=lm, train=train, held_out=held_out, save_best=True, **options
        )
        metrics = trainer.train().metrics
        assert metrics["initial/ce"] > metrics["initial/ce_clean"] == pytest.approx(metrics["eval/ce_clean"])
        assert metrics["eval/ce"] < metrics["initial/ce"] - 0.3
        assert 0 < metrics["eval/kl"] < metrics["initial/kl"]
        best = AutoSae.from_pretrained(tmp_path / loss / "best")
        assert list(best) == ["layers.0", "layers.2.mlp"]
        saved = json.loads((tmp_path / loss / "metrics.json").read_text())
        assert saved["initial/ce"] == metrics["initial/ce"]


def test_the_best_set_is_the_one_with_the_lowest_loss(tmp_path):
    lm, rows = trained_llama()
    options = dict(loss="ce", max_steps=12, optim="adam", learning_rate=0.05, eval_steps=2, save_best=True)
    trainer = tiny_trainer(
        tmp_path, [SAE], lm=lm, train=rows.select(range(8, 64)), held_out=rows.select(range(8)), **options
    )
    seen = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args: seen.append(evaluate(*args)) or seen[-1]
    trainer.train()
    lowest = min(metrics["eval/ce"] for metrics in seen)
    assert trainer.run_state.best == {"ce": lowest}
    batch = torch.tensor(rows[:8]["input_ids"])
    with torch.no_grad(), splice(lm, AutoSae.from_pretrained(tmp_path / "best")):
        assert lm(batch, labels=batch).loss.item() == pytest.approx(lowest, rel=1e-4)


@pytest.mark.parametrize("optim", ["signum", "adam"])
def test_a_killed_end_to_end_run_resumes_bit_for_bit(tmp_path, optim):
    options = dict(heads=[SAE, TRANSCODER], loss="kl", fvu_weight=0.5, optim=optim, max_steps=6, save_steps=2)
    whole, resumed = whole_and_resumed(tmp_path, lambda folder, **more: tiny_trainer(folder, **options, **more))
    assert_equal(weights(whole), weights(resumed))
    assert whole.run_state.initial_metrics == resumed.run_state.initial_metrics


def _kl(lm, heads, rows):
    """KL of the LM with heads at their hookpoints from the LM without, by hooks of its own."""
    with torch.no_grad():
        clean = lm(rows).logits.log_softmax(-1)
    handles = []
    for name, head in heads.items():

        def hook(module, args, kwargs, output, head=head):
            own = output[0] if isinstance(output, tuple) else output
            read = own if isinstance(head, SaeModel) else (*args, *kwargs.values())[0]
            new = head(read, own).reconstruction
            return (new, *output[1:]) if isinstance(output, tuple) else new

        module = lm.base_model.get_submodule(name)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    spliced = lm(rows).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    return F.kl_div(spliced, clean, log_target=True, reduction="none").sum(-1).mean()


def test_gpt2_trains_by_kl_through_its_attention(tmp_path):
    heads = [
        HeadArguments(hookpoints="h.1.attn", type="transcoder", k=4, expansion_factor=4),
        HeadArguments(hookpoints="h.0.mlp.act", k=4, expansion_factor=4),
    ]
    lm, data, course = tiny_gpt2(), tiny_tokens(4), Course()
    with torch.no_grad():
        # As it is made its logits are near zero whatever comes.
        [parameter.mul_(5) for parameter in lm.parameters() if parameter.ndim == 2]
    options = dict(loss="kl", optim="adam", learning_rate=1e-2, warmup_steps=0, max_steps=6, logging_steps=1)
    trainer = tiny_trainer(tmp_path, heads, lm=lm, train=data, callbacks=[course], **options)
    trainer.train()
    logged = [log["train/kl"] for log in trainer.state.log_history]
    rows = torch.tensor(data["input_ids"])
    for found, gradients, before in zip(logged, course.gradients[:-1], course.weights[:-1], strict=True):
        trainer.bank.load_state_dict(before)
        kl = _kl(lm, trainer.heads, rows)
        assert found == pytest.approx(kl.item(), rel=1e-4)
        names, parameters = zip(*trainer.bank.named_parameters(), strict=True)
        expected = torch.autograd.grad(kl, parameters, materialize_grads=True)
        for name, gradient in zip(names, expected, strict=True):
            atol = 1e-4 * gradient.abs().max().item()
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=atol)
    assert logged[-1] < 0.8 * logged[0]


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        ([SAE], dict(fvu_weight=0.5), "fvu_weight: it needs loss ce or kl"),
        ([SAE, HeadArguments(hookpoints="layers.0", name="b")], dict(loss="ce"), "would both replace the output"),
        (
            [HeadArguments(auxk_alpha=0.1)],
            dict(loss="ce"),
            r"heads\[0\].auxk_alpha: it is a part of a head's own loss",
        ),
        ([HeadArguments(multi_topk=True)], dict(loss="kl"), r"heads\[0\].multi_topk"),
        ([SAE], dict(loss="ce", micro_batches=5), "a batch is cut by sequences, and it has 4"),
        ([SAE], dict(save_best=True), "there are no held-out sequences"),
    ],
)
def test_combinations_that_cannot_be_run_are_refused(tmp_path, heads, options, message):
    with pytest.raises(InputError, match=message):
        tiny_trainer(tmp_path, heads, max_steps=1, **options)


def test_an_lm_without_a_head_for_the_next_token_is_refused(tmp_path):
    with pytest.raises(InputError, match="and LlamaModel has none"):
        tiny_trainer(tmp_path, [SAE], lm=tiny_llama().base_model, loss="ce", max_steps=1)
    masked = BertForMaskedLM(BertConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4))
    entry = HeadArguments(hookpoints="encoder.layer.0", k=4)
    with pytest.raises(InputError, match="and BertForMaskedLM has none"):
        tiny_trainer(tmp_path, [entry], lm=masked, loss="kl", max_steps=1)


def test_auxk_alone_moves_dead_latents_beside_the_end_to_end_loss(tmp_path):
    moved = {}
    for alpha in (0.0, 0.5):
        entry = HeadArguments(
            hookpoints="layers.1",
            k=2,
            normalize_decoder=False,
            expansion_factor=8,
            auxk_alpha=alpha,
            dead_after_tokens=1,
        )
        course = Course()
        options = dict(loss="ce", fvu_weight=1.0, optim="adam", max_steps=2, callbacks=[course])
        trainer = tiny_trainer(tmp_path / str(alpha), [entry], **options)
        trainer.train()
        if not alpha:
            # In the first step no latent is dead, so that both runs select the same ones in both steps.
            silent = trainer.tokens_since_fired["layers.1"] == trainer.state.num_input_tokens_seen
        for name in ("encoder.weight", "encoder.bias", "W_dec"):
            start, end = (course.weights[i][f"heads.layers:1.{name}"][silent] for i in (0, -1))
            moved[alpha, name] = (start != end).view(len(start), -1).any(1)
    assert silent.sum() > 40
    for name in ("encoder.weight", "encoder.bias", "W_dec"):
        assert not moved[0.0, name].any() and moved[0.5, name].float().mean() > 0.9

"""Hookpoints of LMs of many kinds, built tiny from their configs."""

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB, tiny_llama, tiny_tokens, tiny_trainer
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
)

from sae_accel.activations.running_lm import RunningLM
from sae_accel.bank.plans import plan_heads
from sae_accel.common.errors import InputError
from sae_accel.lm.hooks import Site
from sae_accel.recipe.arguments import HeadArguments


SMALL = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3)
HEADS = dict(num_attention_heads=4, intermediate_size=40)
GROUPED = dict(**SMALL, **HEADS, num_key_value_heads=2)
EXPERTS = dict(num_experts_per_tok=2)
# For each kind the config, hookpoints of SAEs, hookpoints of transcoders, and whether it predicts tokens.
KINDS = {
    "gpt2": (
        GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=4, n_positions=64),
        ["h.1", "h.1.attn", "h.0.mlp.act", "wte"],
        ["h.1.mlp"],
        True,
    ),
    "gpt_neox": (GPTNeoXConfig(**SMALL, **HEADS), ["layers.1", "layers.1.mlp.act"], ["layers.0.attention"], True),
    "llama": (LlamaConfig(**GROUPED), ["layers.1", "layers.1.self_attn.q_proj"], ["layers.2.mlp"], True),
    "gemma2": (
        Gemma2Config(**GROUPED, head_dim=6),
        ["layers.1", "layers.1.post_feedforward_layernorm"],
        ["layers.0.mlp"],
        True,
    ),
    "gemma3": (Gemma3TextConfig(**GROUPED, head_dim=6), ["layers.1"], ["layers.0.self_attn"], True),
    "qwen3": (Qwen3Config(**GROUPED, head_dim=6), ["layers.1", "layers.1.self_attn.o_proj"], ["layers.0.mlp"], True),
    "mixtral": (
        MixtralConfig(**GROUPED, num_local_experts=4, **EXPERTS),
        ["layers.1", "layers.0.mlp.gate", "layers.0.mlp.experts"],
        ["layers.1.mlp"],
        True,
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(**GROUPED, head_dim=6, num_experts=4, moe_intermediate_size=20, **EXPERTS),
        ["layers.1", "layers.0.mlp.gate"],
        ["layers.1.mlp"],
        True,
    ),
    "mamba": (MambaConfig(**SMALL, state_size=4), ["layers.1", "layers.0.mixer.in_proj"], ["layers.1.mixer"], True),
    "bert": (BertConfig(**SMALL, **HEADS), ["encoder.layer.1", "encoder.layer.1.attention"], [], False),
    "t5": (
        T5Config(vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4),
        ["encoder.block.1", "encoder.block.0.layer.0"],
        ["encoder.block.1.layer.1.DenseReluDense"],
        False,
    ),
    "vit": (
        ViTConfig(**(SMALL | dict(vocab_size=None)), **HEADS, image_size=16, patch_size=4),
        ["layers.1"],
        [],
        False,
    ),
}
MOE_HOOKPOINT = "layers.0.mlp.experts.act_fn"


def _entries(saes, transcoders):
    options = dict(k=2, expansion_factor=2)
    entries = [HeadArguments(hookpoints=saes, **options)]
    return entries + [HeadArguments(hookpoints=name, type="transcoder", **options) for name in transcoders]


def _rows(kind):
    if kind != "vit":
        return tiny_tokens(16)
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"pixel_values": images.tolist()})


@pytest.mark.parametrize("kind", KINDS)
def test_hookpoints_resolve_without_weights_and_heads_train(tmp_path, kind):
    config, saes, transcoders, predicts = KINDS[kind]
    torch.manual_seed(0)
    lm = (AutoModelForCausalLM if predicts else AutoModel).from_config(config)
    entries = _entries(saes, transcoders)
    with torch.device("meta"):
        experts = {"experts_implementation": "batched_mm"} if kind in ("mixtral", "qwen3_moe") else {}
        planned = plan_heads(AutoModel.from_config(config, **experts), entries)
    assert [plan.name for plan in planned] == [*saes, *transcoders] == [plan.name for plan in plan_heads(lm, entries)]
    rows = _rows(kind)
    # Random LMs have MLPs whose outputs are thousandths, so larger steps would overshoot.
    options = dict(max_steps=2, optim="adam", learning_rate=1e-5, warmup_steps=0)
    trainer = tiny_trainer(tmp_path, entries, lm=lm, train=rows, held_out=rows, **options)
    start = {name: value.clone() for name, value in trainer.bank.state_dict().items()}
    metrics = trainer.train().metrics
    for name, head in trainer.heads.items():
        assert 0 < metrics[f"eval/fvu/{name}"] < 1.5, name
        prefix = f"heads.{name.replace('.', ':')}."
        assert not torch.equal(head.W_dec, start[prefix + "W_dec"]), name
    sequence = 17 if kind == "vit" else 16
    assert trainer.state.num_input_tokens_seen == 2 * 4 * sequence


@pytest.mark.parametrize("kind", [kind for kind, (*_, predicts) in KINDS.items() if predicts])
def test_heads_train_end_to_end(tmp_path, kind):
    config, saes, transcoders, _ = KINDS[kind]
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    rows = _rows(kind)
    options = dict(train=rows, held_out=rows, max_steps=8, loss="kl", optim="adam", learning_rate=1e-3, warmup_steps=0)
    trainer = tiny_trainer(tmp_path, _entries(saes[:1], transcoders), lm=lm, **options)
    metrics = trainer.train().metrics
    with torch.no_grad():
        ids = torch.tensor(rows["input_ids"])
        assert metrics["eval/ce_clean"] == pytest.approx(lm(ids, labels=ids).loss.item(), rel=1e-4)
    assert metrics["eval/kl"] < metrics["initial/kl"]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_an_experts_inner_module_gets_the_tokens_that_reach_it(tmp_path, implementation):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(KINDS["mixtral"][0], experts_implementation=implementation)
    seen = []
    (plan,) = plan_heads(lm, _entries([MOE_HOOKPOINT], []))
    assert plan.predicts == (Site(MOE_HOOKPOINT, "output", within="layers.0.mlp.experts"),) and plan.config.d_in == 40
    trainer = tiny_trainer(tmp_path, _entries([MOE_HOOKPOINT, "layers.2"], []), lm=lm, max_steps=1)
    lm.base_model.get_submodule(MOE_HOOKPOINT).register_forward_hook(lambda *a: seen.append(a[2].flatten(0, -2)))
    batch = {"input_ids": torch.tensor(tiny_tokens(4)["input_ids"])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    activations = trainer.activations(batch)
    assert torch.equal(activations.by_site[plan.predicts[0]], torch.cat(seen))
    # Every token goes to two experts.
    assert len(activations.by_site[plan.predicts[0]]) == 2 * activations.num_tokens == 128
    trainer.train()


class _Experts(torch.nn.Module):
    """A mixture in the old style: a module for each expert, run on its own tokens if there are any."""

    def __init__(self, d_model, num_experts):
        super().__init__()
        self.router = torch.nn.Linear(d_model, num_experts)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(d_model, d_model) for _ in range(num_experts))

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen = self.router(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(flat[chosen == i])
        return out.view_as(x)


def test_an_expert_that_a_batch_does_not_reach_trains_on_nothing_in_it(tmp_path):
    lm = tiny_llama()
    lm.model.layers[1].mlp = _Experts(24, 3)
    hookpoints = ["layers.1.mlp.experts.0", "layers.1.mlp.experts.1", "layers.1.mlp.router", "layers.0"]
    trainer = tiny_trainer(tmp_path, _entries(hookpoints, ["layers.1.mlp.experts.2"]), lm=lm, max_steps=3)
    with torch.no_grad():
        lm.model.layers[1].mlp.router.bias[1] = -1e3
    ran = []
    lm.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    trainer.train()
    assert not ran
    sites = {site.module: rows for site, rows in trainer.activations(_batch()).by_site.items()}
    assert sites["layers.1.mlp.experts.1"].shape == (0, 24)
    reached = [sites[f"layers.1.mlp.experts.{i}"] for i in (0, 2)]
    assert sum(map(len, reached[:1])) < 64 and sites["layers.1.mlp.router"].shape == (64, 3)
    assert all(torch.isfinite(value).all() for value in trainer.bank.state_dict().values())


def _batch():
    ids = torch.tensor(tiny_tokens(4)["input_ids"])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_layer_that_is_shared_is_read_at_each_of_its_runs():
    torch.manual_seed(0)
    lm = AutoModel.from_config(AlbertConfig(**SMALL, **HEADS, embedding_size=12)).eval()
    name = "encoder.albert_layer_groups.0.albert_layers.0"
    (plan,) = plan_heads(lm, _entries([name], []))
    rows = RunningLM(lm, list(plan.reads), [])(_batch()).by_site[plan.reads[0]]
    hidden = lm(**_batch(), output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(rows, torch.cat([one.flatten(0, 1) for one in hidden]))


@pytest.mark.parametrize(
    ("kind", "hookpoint", "message"),
    [
        ("llama", "rotary_emb", "'rotary_emb' is not one activation for each token"),
        ("qwen3", "layers.0.self_attn.q_norm", r"not one activation for each token.*\(2, 31, 4, 6\)"),
        ("gpt2", "wpe", "'wpe' is not one activation for each token"),
        ("mamba", "layers.0.mixer.conv1d", "'layers.0.mixer.conv1d' is not run in a forward pass"),
        ("bert", "pooler", "'pooler' is not one activation for each token"),
        ("t5", "decoder.block.0", "'decoder.block.0' is not run in a forward pass"),
        ("vit", "embeddings.patch_embeddings.projection", "is not one activation for each token"),
    ],
)
def test_what_cannot_be_hooked_is_refused_by_name(kind, hookpoint, message):
    with pytest.raises(InputError, match=message):
        plan_heads(AutoModel.from_config(KINDS[kind][0]), _entries([hookpoint], []))


def test_an_expert_takes_no_excluded_tokens_and_no_end_to_end_loss(tmp_path):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(KINDS["mixtral"][0])
    with pytest.raises(InputError, match="may run any number of times in a forward pass, so no head"):
        tiny_trainer(tmp_path, _entries([MOE_HOOKPOINT], []), lm=lm, max_steps=1, loss="ce")
    trainer = tiny_trainer(tmp_path, _entries([MOE_HOOKPOINT], []), lm=lm, max_steps=1, exclude_tokens=[3])
    with pytest.raises(InputError, match="gives 128 activations for 64 tokens"):
        trainer.train()

from contextlib import contextmanager

import pytest
import torch
from tiny import VOCAB, tiny_gpt2, tiny_llama

from sae_accel.common.errors import InputError
from sae_accel.lm.splice import splice
from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


def _batch(rows=3, ctx_len=8, seed=3):
    ids = torch.randint(0, VOCAB, (rows, ctx_len), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_spliced_sae_replaces_the_output_and_leaves_no_trace():
    torch.manual_seed(0)
    lm, batch = tiny_llama().eval(), _batch()
    sae = SaeModel(SaeConfig(d_in=24, expansion_factor=4, k=4, hookpoint="layers.1"))
    clean = lm(**batch).logits
    hidden = lm(**batch, output_hidden_states=True).hidden_states[2]
    with torch.no_grad(), splice(lm, {"layers.1": sae}) as latents:
        spliced = lm(**batch).logits
    expected = lm.lm_head(_after_layer_1(lm, sae(hidden).reconstruction, batch))
    torch.testing.assert_close(spliced, expected)
    assert torch.equal(latents["layers.1"].top_indices, sae.encode(hidden).top_indices)
    assert torch.equal(lm(**batch).logits, clean)


def _after_layer_1(lm, hidden, batch):
    lm.model.layers[1].register_forward_hook(lambda *_: hidden)
    try:
        return lm.base_model(**batch).last_hidden_state
    finally:
        lm.model.layers[1]._forward_hooks.clear()


def test_reading_latents_leaves_the_lm_as_it_is():
    lm, batch = tiny_gpt2().eval(), _batch()
    sae = SaeModel(SaeConfig(d_in=24, k=4))
    clean = lm(**batch).logits
    with splice(lm, {"h.1.attn": sae}, replace=False) as latents:
        assert torch.equal(lm(**batch).logits, clean)
    assert latents["h.1.attn"].top_acts.shape == (3, 8, 4)


def test_a_spliced_transcoder_reads_the_input_or_its_source():
    torch.manual_seed(0)
    lm, batch = tiny_llama().eval(), _batch()
    options = dict(d_in=24, k=4, skip_connection=True, expansion_factor=4, hookpoint="layers.1.mlp")
    transcoder = TranscoderModel(TranscoderConfig(**options))
    torch.nn.init.normal_(transcoder.W_dec)
    torch.nn.init.normal_(transcoder.W_skip)
    twin = TranscoderModel(TranscoderConfig(**options, source="layers.1.post_attention_layernorm"))
    twin.load_state_dict(transcoder.state_dict())
    with torch.no_grad():
        with splice(lm, transcoder):
            own = lm(**batch).logits
        with splice(lm, twin):
            source = lm(**batch).logits
        assert not torch.allclose(own, lm(**batch).logits)
    torch.testing.assert_close(own, source)


def _lm_and_head(make, hookpoint, model_class, config_class):
    """An LM that attends to some tokens more than to others, and a head that changes what comes after it."""
    lm = make().eval()
    torch.manual_seed(1)
    head = model_class(config_class(d_in=24, k=4, expansion_factor=4, hookpoint=hookpoint))
    with torch.no_grad():
        [parameter.mul_(5) for parameter in lm.parameters() if parameter.ndim == 2]
        head.W_dec.normal_()
    return lm, head


@contextmanager
def _by_a_hook(lm, head):
    """The head in the LM, whose module runs as ever and has the first part of its output exchanged."""

    def exchange(module, args, kwargs, output):
        own, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        read = own if isinstance(head, SaeModel) else (*args, *kwargs.values())[0]
        new = head.decode(*head.encode(read))
        return new if rest is None else (new, *rest)

    module = lm.base_model.get_submodule(head.config.hookpoint)
    handle = module.register_forward_hook(exchange, with_kwargs=True)
    yield
    handle.remove()


SAE, TRANSCODER = (SaeModel, SaeConfig), (TranscoderModel, TranscoderConfig)


@pytest.mark.parametrize("kind", [SAE, TRANSCODER], ids=["sae", "transcoder"])
@pytest.mark.parametrize(("make", "hookpoint"), [(tiny_gpt2, "h.1.attn"), (tiny_llama, "layers.1.self_attn")])
def test_a_spliced_attention_still_gives_its_weights(make, hookpoint, kind):
    lm, head = _lm_and_head(make, hookpoint, *kind)
    lm.set_attn_implementation("eager")
    given = []
    for seed in (3, 4):
        options = _batch(seed=seed) | {"output_attentions": True, "use_cache": False}
        with torch.no_grad():
            clean = lm(**options).attentions
            with _by_a_hook(lm, head):
                expected = lm(**options).attentions
            with splice(lm, head):
                module = lm.base_model.get_submodule(hookpoint)
                watch = module.register_forward_hook(lambda module, args, output: given.append(output))
                found = lm(**options).attentions
                watch.remove()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(given[-1][1], clean[1])
        assert (found[2] - clean[2]).abs().max() > 0.1


def test_a_spliced_attention_gives_its_weights_after_passes_that_asked_for_none():
    lm, head = _lm_and_head(tiny_llama, "layers.1.self_attn", *TRANSCODER)
    options = _batch() | {"use_cache": False}
    with torch.no_grad(), splice(lm, head):
        lm(**options)
        lm.set_attn_implementation("eager")
        assert len(lm(**options, output_attentions=True).attentions) == len(lm.model.layers)


@pytest.mark.parametrize(
    ("make", "hookpoint", "kind"),
    [
        # The first layer's keys tell how many tokens came before.
        (tiny_gpt2, "h.0.attn", SAE),
        (tiny_gpt2, "h.0.attn", TRANSCODER),
        (tiny_gpt2, "h.1.attn", TRANSCODER),
        (tiny_llama, "layers.0.self_attn", TRANSCODER),
        (tiny_llama, "layers.1.mlp", TRANSCODER),
    ],
)
def test_tokens_one_at_a_time_with_a_cache_give_what_all_together_give_without(make, hookpoint, kind):
    lm, head = _lm_and_head(make, hookpoint, *kind)
    ids = _batch()["input_ids"]
    with torch.no_grad():
        clean = lm(ids).logits
        with _by_a_hook(lm, head):
            reference = lm(ids, use_cache=True)
        with splice(lm, head):
            together = lm(ids, use_cache=False).logits
            cache, logits = None, []
            for token in ids.split(1, dim=1):
                output = lm(token, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
    assert (together - clean).abs().max() > 0.1
    torch.testing.assert_close(together, reference.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(logits, 1), reference.logits, rtol=1e-4, atol=1e-4)
    for layer, expected in zip(cache.layers, reference.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_fit_are_refused():
    lm = tiny_llama()
    sae = SaeModel(SaeConfig(d_in=24, k=4))
    with pytest.raises(InputError, match="'h.1' does not fit LlamaModel"), splice(lm, {"h.1": sae}):
        pass
    with (
        pytest.raises(InputError, match="Two heads would replace"),
        splice(lm, {"layers.1/a": sae, "layers.1/b": sae}),
    ):
        pass

import pytest
import torch
from tiny import VOCAB, tiny_gpt2, tiny_llama

from sae_accel.common.errors import InputError
from sae_accel.lm.splice import splice
from sae_accel.models import SaeConfig, SaeModel, TranscoderConfig, TranscoderModel


def _batch(rows=3, ctx_len=8):
    ids = torch.randint(0, VOCAB, (rows, ctx_len), generator=torch.Generator().manual_seed(3))
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


def test_splicing_keeps_the_rest_of_a_tuple():
    lm, batch = tiny_gpt2().eval(), _batch()
    lm.set_attn_implementation("eager")
    with torch.no_grad(), splice(lm, {"h.1.attn": SaeModel(SaeConfig(d_in=24, k=4))}):
        assert lm(**batch, output_attentions=True).attentions[1] is not None


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

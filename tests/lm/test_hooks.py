import pytest
import torch
from tiny import VOCAB, tiny_bert, tiny_gpt2, tiny_llama

from sae_accel.activations.running_lm import RunningLM
from sae_accel.common.errors import InputError
from sae_accel.lm.hooks import Site, capture


def _batch(rows=3, ctx_len=8):
    ids = torch.randint(0, VOCAB, (rows, ctx_len), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_captured_outputs_are_the_hidden_states():
    lm, batch = tiny_llama(), _batch()
    expected = lm(**batch, output_hidden_states=True).hidden_states
    sites = [Site("embed_tokens", "output"), Site("layers.1", "output"), Site("layers.2", "input")]
    found = capture(lm.base_model, sites, batch)
    torch.testing.assert_close(found[sites[0]], expected[0].flatten(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(found[sites[1]], expected[2].flatten(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(found[sites[2]], expected[2].flatten(0, 1), rtol=0, atol=0)


def test_no_layer_behind_the_deepest_hookpoint_runs():
    lm = tiny_llama()
    ran = []
    for i, layer in enumerate(lm.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    lm.model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    lm.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    capture(lm.base_model, [Site("layers.0", "output"), Site("layers.2.mlp", "input")], _batch())
    assert ran == [0, 1]


def test_a_module_called_with_keywords_and_giving_a_tuple_can_be_read():
    lm = tiny_llama()
    site_in, site_out = Site("layers.1.self_attn", "input"), Site("layers.1.self_attn", "output")
    found = capture(lm.base_model, [site_in, site_out], _batch())
    normed = capture(lm.base_model, [Site("layers.1.input_layernorm", "output")], _batch())
    torch.testing.assert_close(found[site_in], normed[Site("layers.1.input_layernorm", "output")], rtol=0, atol=0)
    assert found[site_out].shape == (24, 24)


def test_padding_and_excluded_tokens_are_left_out():
    lm, batch = tiny_llama(), _batch()
    batch["attention_mask"][1, 5:] = 0
    batch["input_ids"][0, 2] = 7
    batch["input_ids"][2, :] = torch.arange(20, 28)
    keep = batch["attention_mask"].bool() & (batch["input_ids"] != 7)
    site = Site("layers.1", "output")
    found = RunningLM(lm, [site], exclude_tokens=[7])(batch)
    hidden = lm(**batch, output_hidden_states=True).hidden_states[2]
    assert found.num_tokens == int(keep.sum()) < keep.numel()
    torch.testing.assert_close(found.by_site[site], hidden[keep])


@pytest.mark.parametrize(
    ("make", "site"),
    [
        (tiny_gpt2, Site("h.1.attn", "output")),
        (tiny_gpt2, Site("h.1.mlp.act", "output")),
        (tiny_bert, Site("encoder.layer.1", "output")),
        (tiny_bert, Site("encoder.layer.1.attention", "output")),
    ],
)
def test_decoders_and_encoders_are_read_without_dropout(make, site):
    lm = make().train()
    source = RunningLM(lm, [site], exclude_tokens=[])
    first, second = source(_batch()).by_site[site], source(_batch()).by_site[site]
    assert torch.equal(first, second) and first.shape[0] == 24
    assert not any(parameter.requires_grad for parameter in lm.parameters())


def test_captured_activations_are_copies():
    class InPlace(torch.nn.Module):
        def forward(self, x):
            return x.mul_(2)

    lm = tiny_llama()
    expected = capture(lm.base_model, [Site("layers.1", "output")], _batch())[Site("layers.1", "output")]
    lm.model.layers[2].input_layernorm = InPlace()
    sites = [Site("layers.1", "output"), Site("layers.2", "output")]
    torch.testing.assert_close(capture(lm.base_model, sites, _batch())[sites[0]], expected, rtol=0, atol=0)


def test_a_module_without_a_tensor_is_refused_by_name():
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return None

    lm = tiny_llama()
    lm.model.layers[1].add_module("silent", Nothing())
    lm.model.layers[1].register_forward_hook(lambda module, args, output: module.silent(output))
    with pytest.raises(InputError, match="'layers.1.silent' holds no floating-point tensor"):
        capture(lm.base_model, [Site("layers.1.silent", "output")], _batch())

"""Rows that are filled up on the left."""

import pytest
import torch
from tiny import VOCAB, tiny_bert, tiny_gpt2, tiny_llama
from transformers import BloomConfig, BloomModel, OPTConfig, OPTModel, RobertaConfig, RobertaModel

from sae_accel.activations.running_lm import RunningLM
from sae_accel.data.collate import collate
from sae_accel.lm.hooks import Site
from sae_accel.training.spliced_lm import SplicedLM


SIZES = dict(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=4)


def tiny_roberta() -> RobertaModel:
    return RobertaModel(RobertaConfig(**SIZES, intermediate_size=40, max_position_embeddings=66, pad_token_id=1))


def tiny_opt() -> OPTModel:
    return OPTModel(OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=24, max_position_embeddings=64))


def tiny_bloom() -> BloomModel:
    return BloomModel(BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=3, n_head=4))


LMS = {
    "llama": (tiny_llama, "layers.1"),
    "gpt2": (tiny_gpt2, "h.1"),
    "bert": (tiny_bert, "encoder.layer.1"),
    "roberta": (tiny_roberta, "encoder.layer.1"),
    "opt": (tiny_opt, "decoder.layers.1"),
    "bloom": (tiny_bloom, "h.1"),
}


def rows(filling: int, length: int = 9) -> dict[str, list[int]]:
    ids = [(7 * i + filling) % (VOCAB - 5) + 3 for i in range(length)]
    return {"input_ids": [1] * filling + ids, "attention_mask": [0] * filling + [1] * length}


@pytest.mark.parametrize("kind", LMS)
def test_activations_are_those_of_the_row_without_what_fills_it_up(kind):
    torch.manual_seed(0)
    make, hookpoint = LMS[kind]
    site = Site(hookpoint, "output")
    source = RunningLM(make(), [site], exclude_tokens=[])
    batch = collate([rows(5), rows(0, 14), rows(2, 6)], pad_token_id=1)
    found = source(batch).by_site[site]
    expected = torch.cat([
        source(collate([{name: values[filling:] for name, values in rows(filling, length).items()}])).by_site[site]
        for filling, length in ((5, 9), (0, 14), (2, 6))
    ])  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_last_hidden_states_of_an_end_to_end_run_are_too(make):
    lm = SplicedLM(make().eval().requires_grad_(False), exclude_tokens=[])
    found = lm.clean(collate([rows(5)]))[0, 5:]
    expected = lm.clean(collate([{name: values[5:] for name, values in rows(5).items()}]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_begin_at_once_are_given_no_positions():
    lm, seen = tiny_llama().model, []
    lm.register_forward_pre_hook(lambda _, args, options: seen.append(set(options)), with_kwargs=True)
    site = Site("layers.1", "output")
    for filling in (0, 3):
        RunningLM(lm, [site], exclude_tokens=[])(collate([rows(filling), rows(0, 4)]))
    assert "position_ids" not in seen[0] and "position_ids" in seen[1]

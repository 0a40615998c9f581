"""How many positions an LM has, against what it can run on."""

import pytest
import torch
import transformers
from tiny import tiny_bert, tiny_gpt2, tiny_llama

from sae_accel.common.errors import InputError
from sae_accel.lm.positions import positions_of, settled_ctx_len


BERT = dict(
    vocab_size=101, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=64,
)  # fmt: skip
GPT = dict(vocab_size=101, n_embd=24, n_layer=2, n_head=4, n_positions=64)
BART = dict(
    vocab_size=101, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=40,
    decoder_attention_heads=4, decoder_ffn_dim=40, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT,
    "gpt_neo": dict(
        vocab_size=101, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "gpt_bigcode": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "ctrl": GPT | {"dff": 40},
    "gpt_neox": BERT,
    "opt": dict(
        vocab_size=101, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40, word_embed_proj_dim=24,
        max_position_embeddings=64,
    ),
    "biogpt": BERT,
    "bert": BERT,
    "roberta": BERT,
    "deberta-v2": BERT,
    "albert": BERT | {"embedding_size": 24},
    "bart": BART,
    "marian": BART,
    "llama": BERT,
    "t5": dict(vocab_size=101, d_model=24, num_layers=2, num_heads=4, d_kv=6, d_ff=40),
    "mamba": dict(vocab_size=101, hidden_size=24, num_hidden_layers=2),
    "bloom": dict(vocab_size=101, hidden_size=24, n_layer=2, n_head=4),
}  # fmt: skip
UNBOUND = {"llama": 64, "gpt_neox": 64, "t5": None, "mamba": None, "bloom": None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_lm_runs_on_as_many_tokens_as_it_has_positions_and_on_no_more(kind):
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    with torch.device("meta"):
        positions = positions_of(transformers.AutoModel.from_config(config))
    if kind in UNBOUND:
        assert (positions and positions.tokens) == UNBOUND[kind] and not (positions and positions.learned)
        return
    assert positions.learned
    model = transformers.AutoModel.from_config(config).eval()
    model = model.get_encoder() if config.is_encoder_decoder else model
    with torch.no_grad():
        model(input_ids=torch.full((1, positions.tokens), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions.tokens + 1), 7))


def test_the_length_is_the_least_of_what_is_usual_and_what_the_lm_has(capsys):
    with torch.device("meta"):
        gpt2, bert, llama = tiny_gpt2(), tiny_bert(), tiny_llama()
    assert [settled_ctx_len(None, lm) for lm in (gpt2, bert, llama)] == [64, 64, 64]
    llama.config.max_position_embeddings = 10_000
    assert settled_ctx_len(None, llama) == 2048
    assert settled_ctx_len(8000, llama) == 8000 and not capsys.readouterr().err
    assert settled_ctx_len(12_000, llama) == 12_000
    assert "data.ctx_len: 12,000 is more than the 10,000 tokens" in capsys.readouterr().err
    for lm in (gpt2, bert):
        with pytest.raises(InputError, match="data.ctx_len: 65 is more than the 64 positions"):
            settled_ctx_len(65, lm)

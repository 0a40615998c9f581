import re

import pytest
import torch
from tiny import VOCAB, command_words, tiny_gpt2, tiny_llama
from transformers import (
    AutoModel,
    BartConfig,
    CLIPConfig,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2VLConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

import sae_accel.train as train
from sae_accel.bank.plans import plan_heads
from sae_accel.common.errors import InputError
from sae_accel.lm.hooks import base_of
from sae_accel.lm.modules import hookpoint_names, match_modules
from sae_accel.lm.splice import splice
from sae_accel.loading.auto import AutoSae
from sae_accel.models import SaeConfig, SaeModel
from sae_accel.recipe.arguments import HeadArguments


SMALL = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
IMAGES = dict(**SMALL, image_size=16, patch_size=4)
TEXT = dict(**SMALL, vocab_size=VOCAB, num_key_value_heads=2)
CODED = dict(d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
CONFIGS = {
    "gemma2": Gemma2Config(**TEXT, head_dim=6),
    "t5": T5Config(vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4),
    "bart": BartConfig(vocab_size=VOCAB, **CODED, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64),
    "llava": LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**IMAGES)),
    "gemma3": Gemma3Config(text_config=dict(**TEXT, head_dim=6, sliding_window=16), vision_config=IMAGES),
    "qwen2vl": Qwen2VLConfig(
        text_config=dict(
            **TEXT, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}
        ),
        vision_config=dict(depth=2, embed_dim=24, hidden_size=24, num_heads=4, patch_size=4),
    ),
    "vit": ViTConfig(**IMAGES),
    "clip": CLIPConfig(
        text_config=dict(**SMALL, vocab_size=VOCAB, max_position_embeddings=64), vision_config=IMAGES, projection_dim=8
    ),
    "whisper": WhisperConfig(
        vocab_size=VOCAB, **CODED, num_mel_bins=8, max_source_positions=20, max_target_positions=20, pad_token_id=0
    ),
    "wav2vec2": Wav2Vec2Config(
        **SMALL,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    ),
}


def architecture(kind):
    if kind in ("llama", "gpt2"):
        return {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]()
    with torch.device("meta"):
        return AutoModel.from_config(CONFIGS[kind])


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        ("llama", "blocks.3.hook_resid_post", "layers.3"),
        ("llama", "blocks.3.hook_resid_pre", "layers.2"),
        ("llama", "blocks.*.hook_resid_post", "layers.*"),
        ("llama", "blocks.[12].hook_mlp_out", "layers.[12].mlp"),
        ("llama", "blocks.3.hook_attn_out", "layers.3.self_attn"),
        ("llama", "blocks.3.attn.hook_z", "layers.3.self_attn"),
        ("llama", "blocks.3.mlp.hook_post", "layers.3.mlp"),
        ("gpt2", "blocks.2.hook_resid_post", "h.2"),
        ("gpt2", "blocks.2.hook_mlp_out", "h.2.mlp"),
        ("gpt2", "blocks.2.mlp.hook_post", "h.2.mlp.act"),
        ("gemma2", "blocks.1.hook_mlp_out", "layers.1.post_feedforward_layernorm"),
        ("gemma2", "blocks.1.hook_attn_out", "layers.1.post_attention_layernorm"),
        ("t5", "blocks.1.hook_resid_post", "encoder.block.1"),
        ("llava", "blocks.1.hook_resid_post", "language_model.layers.1"),
        ("llama", "model.layers.3", "layers.3"),
        ("llama", "model.layers.*.mlp", "layers.*.mlp"),
        ("llama", "transformer.h.3.attn", "layers.3.self_attn"),
        ("llama", "encoder.layers.3", "layers.3"),
        ("gpt2", "transformer.h.2", "h.2"),
        ("gpt2", "layers.2", "h.2"),
        ("gpt2", "model.layers.*.mlp", "h.*.mlp"),
        ("t5", "layers.1", "encoder.block.1"),
        ("bart", "model.layers.1", "encoder.layers.1"),
        ("llava", "layers.1", "language_model.layers.1"),
        ("llava", "layers.*.mlp", "language_model.layers.*.mlp"),
        ("gemma3", "model.layers.1", "language_model.layers.1"),
        ("qwen2vl", "layers.1", "language_model.layers.1"),
    ],
)
def test_a_name_from_elsewhere_is_told_in_this_lms_words(kind, given, meant):
    lm = architecture(kind)
    with pytest.raises(InputError, match="matches no module") as refusal:
        plan_heads(lm, [HeadArguments(hookpoints=given, k=2, expansion_factor=2)])
    advice = str(refusal.value).split("matches no module")[1]
    assert f"'{meant}'" in advice and "\n" not in advice
    assert list(match_modules(meant, hookpoint_names(base_of(lm))))


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("blocks.7.hook_resid_post", "this LM has layers 0 to 3"),
        ("blocks.0.hook_resid_pre", "is the input of 'layers.0'"),
        ("layers.*.mpl", "Near names: layers."),
    ],
)
def test_what_this_lm_does_not_have_is_said_so(given, advice):
    with pytest.raises(InputError, match=advice):
        plan_heads(tiny_llama(), [HeadArguments(hookpoints=given, k=2, expansion_factor=2)])


def test_a_source_is_told_in_this_lms_words():
    entry = HeadArguments(hookpoints="layers.*.mlp", type="transcoder", source="model.layers.{0}", k=2)
    with pytest.raises(InputError, match=r"heads\[0\].source: .*In this LM it is 'layers.0'"):
        plan_heads(tiny_llama(), [entry])


@pytest.mark.parametrize(
    ("kind", "given", "meant"), [("llama", "model.layers.1", "layers.1"), ("gpt2", "layers.1", "h.1")]
)
def test_splice_tells_where_a_head_would_fit(kind, given, meant):
    head = SaeModel(SaeConfig(d_in=24, num_latents=48, k=2, hookpoint=given))
    with pytest.raises(InputError, match=f"no module '{given}'. In this LM it is '{meant}'"):
        with splice(architecture(kind), head):
            pass


@pytest.mark.parametrize("asked", ["model.layers.1", "blocks.1.hook_resid_post", "transformer.layers.1"])
def test_heads_are_found_or_told_by_names_from_elsewhere(tmp_path, asked):
    for name in ("layers.1", "layers.10", "layers.11"):
        SaeModel(SaeConfig(d_in=24, num_latents=48, k=2, hookpoint=name)).save_pretrained(tmp_path / name)
    if asked.startswith("blocks"):
        assert AutoSae.from_pretrained(tmp_path, hookpoint=asked).config.hookpoint == "layers.1"
    else:
        with pytest.raises(InputError, match=r"Near names: layers\.1\.$"):
            AutoSae.from_pretrained(tmp_path, hookpoint=asked)


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("vit", "reads images, .* SaeTrainer trains on it, with rows that have `pixel_values`"),
        ("whisper", "reads audio"),
        ("wav2vec2", "reads audio"),
        ("clip", "a recipe trains on text"),
    ],
)
def test_a_model_that_reads_no_text_is_one_line(place, tmp_path, capsys, kind, reads):
    # Its config is all that is read before it is refused.
    CONFIGS[kind].save_pretrained(tmp_path / "lm")
    assert train.main(command_words(place, tmp_path, **{"model.name_or_path": tmp_path / "lm"})) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sae_accel: model.name_or_path: ") and re.search(reads, line)

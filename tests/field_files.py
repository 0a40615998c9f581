"""Writes LMs, an adapter and data into the current folder, for the fields of a recipe to name."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tiny import VOCAB, tiny_llama


LOUDER = """
from transformers import LlamaConfig, LlamaModel

class LouderConfig(LlamaConfig):
    model_type = "louder"

class LouderModel(LlamaModel):
    config_class = LouderConfig

print("Louder runs.")
"""
CONFIGURATIONS = """---
configs:
- {config_name: one, default: true, data_files: first.jsonl}
- config_name: two
  data_files: [{split: train, path: second.jsonl}, {split: test, path: test.jsonl}]
---
"""


def write_lms(lm: Path) -> None:
    """
    Writes LMs beside `lm`: `small` with 2 layers, `half` in bfloat16, `louder` with code of its own, `gguf/lm.gguf`,
    and `broken`, which gives NaN for token 12. `large` is a config alone, since a memory plan needs no weights. Also
    writes `adapter`, a LoRA of `lm`.
    """
    for name in ("lm", "small", "half", "louder", "broken"):
        shutil.copytree(lm, name)
    broken = tiny_llama()
    broken.model.embed_tokens.weight.data[12] = float("nan")
    broken.save_pretrained("broken")
    tiny_llama(layers=2).save_pretrained("small")
    tiny_llama(dtype=torch.bfloat16).save_pretrained("half")
    config = json.loads((lm / "config.json").read_text())
    code = {"AutoConfig": "louder.LouderConfig", "AutoModel": "louder.LouderModel"}
    Path("louder/louder.py").write_text(LOUDER)
    Path("louder/config.json").write_text(json.dumps(config | {"model_type": "louder", "auto_map": code}))
    sizes = {"hidden_size": 1024, "head_dim": 256, "intermediate_size": 4096, "num_hidden_layers": 6}
    Path("large").mkdir()
    Path("large/config.json").write_text(json.dumps(config | sizes))
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained("adapter")
    _write_gguf()


def write_data() -> None:
    """
    Writes files of ids and text. In `counting.bin`, sequence i repeats token i. In `alternating.bin`, tokens 5 and 6
    alternate, and so they do in `wide.bin`, with 32 bits per token. In `dataset`, each file repeats one word in `text`
    and another in `body`. `lines.txt` has 7 words per line, and `nulls.jsonl` a null in row 150 of 200.
    """
    np.repeat(np.arange(100, dtype="uint16"), 16).tofile("counting.bin")
    for name, dtype in (("alternating", "uint16"), ("wide", "uint32")):
        np.tile(np.array([5, 6], dtype), 800).tofile(f"{name}.bin")
    Path("lines.txt").write_text(f"{' '.join(['w8'] * 7)}\n" * 200)
    rows = [json.dumps({"text": None if i == 150 else " ".join(["w8"] * 16)}) for i in range(200)]
    Path("nulls.jsonl").write_text("\n".join(rows))
    Path("dataset").mkdir()
    Path("dataset/README.md").write_text(CONFIGURATIONS)
    for name, word in (("first", 10), ("second", 20), ("test", 30)):
        # Word w0 is token 2.
        row = {"text": " ".join([f"w{word - 2}"] * 20), "body": " ".join([f"w{word - 1}"] * 20)}
        Path(f"dataset/{name}.jsonl").write_text("\n".join([json.dumps(row)] * 40))


def _write_gguf() -> None:
    Path("gguf").mkdir()
    lm, file = tiny_llama(), gguf.GGUFWriter("gguf/lm.gguf", "llama")
    about = {
        "block_count": 4,
        "context_length": 64,
        "embedding_length": 24,
        "feed_forward_length": 40,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": lm.config.rms_norm_eps,
        "rope_dimension_count": 6,
        "vocab_size": VOCAB,
        "tokenizer_model": "gpt2",
        "token_list": ["w", "1", "w1", *(f"x{i}" for i in range(3, VOCAB))],
        "token_merges": ["w 1"],
        "eos_token_id": 0,
    }
    for name, value in about.items():
        getattr(file, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, tensor in lm.state_dict().items():
        file.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()

"""
The fields of a recipe, one dataclass per section: `model`, `data`, `heads`, `lora` and `training`.

Each field is defined once, by `option`: its default, its meaning (the text of `--help`) and its limits. The YAML
reader, the command line and the documentation all come from these definitions.
"""

import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from .option import Help as Help
from .option import option as _option
from .training_arguments import SaeTrainingArguments


# Each kind of head, with the fields of an entry that it refuses and the reason. `models.register` adds kinds.
_ONLY_TRANSCODERS = "only a transcoder has one. Set --heads.type transcoder, or remove it."
KINDS: dict[str, dict[str, str]] = {
    "sae": {"source": _ONLY_TRANSCODERS, "skip_connection": _ONLY_TRANSCODERS},
    "transcoder": {
        "normalize_decoder": "a transcoder's decoder starts at zero and cannot have rows of norm 1. Remove it.",
    },
}


DEFAULT_CTX_LEN = 2048


@dataclass(kw_only=True)
class ModelArguments:
    """
    The frozen LM whose activations the heads read.

    Examples:
        ```python
        from sae_accel import ModelArguments

        ModelArguments(name_or_path="meta-llama/Meta-Llama-3-8B", dtype="bfloat16")
        ModelArguments(name_or_path="meta-llama/Meta-Llama-3-8B", quantization="4bit", device_map="auto")
        ```
    """

    name_or_path: str = _option("HuggingFaceTB/SmolLM2-135M", "Hub id or folder of the language model (LM).")
    revision: str | None = _option(None, "Branch, tag or commit of the model on the Hub; the main branch if not set.")
    token: str | None = _option(
        None, "Hub token for a private or gated model; the stored login if not set. It is never saved.", secret=True
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Precision of the LM's weights; auto keeps the precision of its files."
    )
    quantization: Literal["8bit", "4bit"] | None = _option(
        None, "Load the LM's linear layers in 8 bits or 4 bits (nf4) with bitsandbytes; not quantised if not set."
    )
    adapter: str | None = _option(
        None,
        "Hub id or folder of a PEFT adapter to put on the LM; none if not set. Hookpoints keep the names that they "
        "have without the adapter.",
    )
    device_map: str | dict | None = _option(
        None,
        "Devices of the LM's modules, as in transformers: auto, balanced, sequential, or a mapping of module to "
        "device. If not set, the whole LM lies on the device of the process.",
        device_keys=True,
    )
    max_memory: dict[str, Any] | None = _option(
        None,
        "With device_map: the memory to use per device, such as {0: 20GiB, cpu: 60GiB}; all free memory if not set.",
        device_keys=True,
    )
    shard: bool = _option(
        False,
        "With several processes and loss fvu: each process holds a part of every layer of the LM, and gathers one "
        "layer at a time. If false, each process holds the whole LM.",
    )
    attn_implementation: str | None = _option(
        None,
        "Attention implementation, as in transformers (sdpa, eager, flash_attention_2, ...); the default of "
        "transformers if not set.",
    )
    gguf_file: str | None = _option(
        None,
        "Name of a GGUF file in the model's folder or repo, whose weights are dequantised; the model's usual files "
        "if not set.",
    )
    trust_remote_code: bool = _option(
        False, "Run Python code from the model's repo. Set it only for repos that you trust."
    )


@dataclass(kw_only=True)
class DataArguments:
    """
    The dataset, and how its texts become sequences of tokens for the LM.

    Examples:
        ```python
        from sae_accel import DataArguments

        DataArguments(path="EleutherAI/SmolLM2-135M-10B", ctx_len=2048, streaming=True)
        DataArguments(path="texts/*.jsonl", text_column="content", eval_examples=64)
        ```
    """

    path: str = _option(
        "EleutherAI/SmolLM2-135M-10B",
        "The dataset: a name for `datasets.load_dataset`, a folder saved by `save_to_disk`, local files of one kind "
        "(a file, a folder or a glob), or a `.bin` file of token ids.",
    )
    name: str | None = _option(
        None, "Configuration of the dataset, the second argument of `load_dataset`; the dataset's default if not set."
    )
    split: str = _option("train", "Split to read. Slices such as `train[:1000]` are allowed.")
    load_args: dict[str, Any] = _option({}, "More arguments of `load_dataset`, such as data_files or revision.")
    streaming: bool = _option(False, "Read the dataset while it downloads, instead of downloading it first.")
    text_column: str = _option(
        "text", "Column that holds the text. A dataset with a column `input_ids` is not tokenised again."
    )
    sample_by: Literal["document", "line", "paragraph"] = _option(
        "document",
        "With a local text file: one document is the whole file, one line, or one paragraph (paragraphs end at an "
        "empty line).",
    )
    separator: str | int | None = _option(
        None,
        "Token to put after each document: a token of the tokenizer, or its id. If not set, EOS, or SEP if the "
        "tokenizer has no EOS.",
    )
    bad_rows: Literal["skip", "stop"] = _option(
        "skip",
        "With a row that gives no sequence, such as a text that is null: skip leaves the row out and counts it; "
        "stop ends the run at the first.",
    )
    max_bad_rows: float = _option(
        0.01,
        "With bad_rows: skip, the number of rows that may be left out; a value below 1 is a fraction of the rows "
        "read so far. The run ends if more rows are bad.",
        minimum=0.0,
    )
    token_dtype: Literal["uint16", "uint32"] | None = _option(
        None, "Integer type of the ids in a `.bin` file. If not set, uint16 if the LM's vocabulary fits, else uint32."
    )
    ctx_len: int | None = _option(
        None, "Tokens per sequence; if not set, 2,048 or the LM's number of positions, whichever is less.", minimum=2
    )
    max_examples: int | None = _option(
        None, "Largest number of sequences to train on; all sequences if not set.", minimum=1
    )
    eval_examples: int = _option(
        32,
        "Number of sequences, the first of the dataset, that are held out from training for evaluation; 0 for none.",
        minimum=0,
    )
    exclude_tokens: list[int] = _option(
        [], "Token ids to ignore, such as BOS: their activations train no head and count in no metric."
    )
    shuffle_seed: int | None = _option(
        42,
        "Seed of the order of the sequences; null keeps the dataset's order. With streaming, sequences are shuffled "
        "within a buffer of 1,000.",
        minimum=0,
    )
    num_proc: int | None = _option(
        None, "Number of processes that tokenise; one if not set. It has no effect with streaming.", minimum=1
    )

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(self.path)
        if isinstance(self.separator, str) and self.separator.isdecimal():
            # A number from the command line arrives as text.
            self.separator = int(self.separator)

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence for callers without an LM: `ctx_len`, or 2,048 if not set."""
        return self.ctx_len or DEFAULT_CTX_LEN


@dataclass(kw_only=True)
class HeadArguments:
    """
    One entry of a recipe's `heads`. It makes one head at each hookpoint that its patterns match.

    Examples:
        ```python
        from sae_accel import HeadArguments

        HeadArguments(hookpoints="layers.*", stride=2, k=192)
        HeadArguments(hookpoints="layers.[0-3].mlp", type="transcoder", skip_connection=True, k=64)
        ```
    """

    hookpoints: list[str] = _option(
        [],
        "Patterns for the names of modules of the LM's base model: `*`, `?` and `[012]` match within one component "
        "of a name, `**` crosses dots. If neither this nor layers is set, every layer's output gets a head.",
    )
    layers: list[int] = _option([], "Numbers of layers whose outputs get a head, as a short form of hookpoints.")
    stride: int = _option(1, "Keep every n-th hookpoint of each pattern's matches, in natural order.", minimum=1)
    source: str | None = _option(
        None,
        "Transcoders only: the module whose output the head reads. {0}, {1} stand for the parts of a name that the "
        "pattern's wildcards match. If not set, the head reads the hookpoint's own input.",
    )
    type: str = _option(
        "sae",
        "Kind of the head: an SAE reconstructs an activation, a transcoder predicts a module's output from its input.",
        choices=KINDS,
    )
    name: str | None = _option(
        None,
        "Name that tells apart several heads at one hookpoint: the head is saved as `<hookpoint>/<name>`; no name "
        "if not set.",
    )
    activation: Literal["topk", "groupmax", "batchtopk", "jumprelu"] = _option(
        "topk",
        "Rule that selects latents. topk: the k largest per token. groupmax: the largest of each of k groups. "
        "batchtopk: the largest of a micro-batch, k per token on average. jumprelu: all above a learnt threshold.",
    )
    k: int = _option(
        32,
        "Active latents per token: exactly with topk and groupmax, on average with batchtopk, as the target of L0 "
        "with jumprelu.",
        minimum=1,
    )
    sparsity_weight: float = _option(1.0, "With jumprelu: weight of `(L0 / k - 1)^2` in the loss.", above=0.0)
    expansion_factor: int = _option(32, "Latents per dimension of the input.", minimum=1)
    num_latents: int | None = _option(
        None, "Number of latents of the head; expansion_factor * d_in if not set.", minimum=1
    )
    skip_connection: bool = _option(False, "Transcoders only: add a linear map of the input to the output.")
    normalize_decoder: bool | None = _option(
        None, "Keep the decoder's rows at norm 1; true for SAEs and false for transcoders if not set."
    )
    seed: int = _option(
        0, "Seed of the initial weights. Heads at different hookpoints still start from different weights.", minimum=0
    )
    learning_rate: float | None = _option(
        None, "Learning rate of these heads; training.learning_rate if not set.", above=0.0
    )
    auxk_alpha: float = _option(
        0.0, "Weight of the AuxK loss, which trains dead latents to fit the residual; 0 turns it off.", minimum=0.0
    )
    multi_topk: bool = _option(False, "Add FVU at 4 * k latents to the loss, with weight 1/8.")
    k_decay_steps: int = _option(
        0,
        "Number of optimizer steps over which k falls linearly from min(10 * d_in, num_latents); 0 turns it off.",
        minimum=0,
    )
    dead_after_tokens: int = _option(
        10_000_000, "Number of tokens without activity after which a latent is dead.", minimum=1
    )

    def __post_init__(self) -> None:
        if isinstance(self.hookpoints, str):
            self.hookpoints = [self.hookpoints]

    @property
    def loss_terms(self) -> dict[str, Any]:
        """The weights of the loss terms, as arguments of a head's forward pass."""
        return {name: getattr(self, name) for name in ("auxk_alpha", "multi_topk", "sparsity_weight")}


@dataclass(kw_only=True)
class LoraArguments:
    """
    A LoRA of the LM that trains around spliced heads, with loss ce or kl. See arXiv:2501.19406.

    Examples:
        ```python
        from sae_accel import HeadArguments, LoraArguments, Recipe, SaeTrainingArguments

        Recipe(
            heads=[HeadArguments(layers=[1])],
            lora=LoraArguments(rank=16, target_modules=["layers.*.mlp.down_proj"]),
            training=SaeTrainingArguments(loss="kl", init_from="runs/quickstart"),
        )
        ```
    """

    rank: int = _option(16, "Rank of the adapter's matrices (`r` in PEFT).", minimum=1)
    alpha: float = _option(
        32.0, "Scale of the adapter: its output is multiplied by alpha / rank (`lora_alpha` in PEFT).", above=0.0
    )
    target_modules: list[str] = _option(
        [],
        "Patterns, as in hookpoints, for the linear layers that get an adapter; if not set, all linear layers after "
        "the first hookpoint's layer.",
    )
    learning_rate: float = _option(2e-4, "Learning rate of the adapter.", above=0.0)
    train_heads: bool = _option(False, "Train the heads together with the adapter; if false, the heads are frozen.")

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]


SECTIONS = {
    "model": ModelArguments,
    "data": DataArguments,
    "heads": HeadArguments,
    "lora": LoraArguments,
    "training": SaeTrainingArguments,
}


def secret_fields(arguments: Any) -> set[str]:
    """Names of a dataclass's fields that must never reach a file or a tracker, such as tokens."""
    return {f.name for f in fields(arguments) if f.metadata["help"].secret}

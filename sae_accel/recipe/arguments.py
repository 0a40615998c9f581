import os
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..common.errors import InputError
from .option import Help as Help
from .option import option as _option


# Kinds of heads, with the fields of an entry that each refuses, and why. `sae_accel.models.register` adds to them.
_ONLY_TRANSCODERS = "only a transcoder has one. Set type: transcoder, or remove it."
KINDS: dict[str, dict[str, str]] = {
    "sae": {"source": _ONLY_TRANSCODERS, "skip_connection": _ONLY_TRANSCODERS},
    "transcoder": {
        "normalize_decoder": "a transcoder's decoder starts at zero, which has no unit norm. Remove it.",
    },
}


DEFAULT_CTX_LEN = 2048


@dataclass(kw_only=True)
class ModelArguments:
    """The frozen LM whose activations are read."""

    name_or_path: str = _option("HuggingFaceTB/SmolLM2-135M", "Hub id or folder of the language model.")
    revision: str | None = _option(None, "Branch, tag or commit of the model on the Hub; the main branch if not set.")
    token: str | None = _option(
        None, "Hub token for a private or gated model; the stored login if not set. Never saved.", secret=True
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Precision of the LM's weights; auto keeps that of its files."
    )
    quantization: Literal["8bit", "4bit"] | None = _option(
        None, "Load the LM's linear layers in 8 bits, or in 4 (nf4), by bitsandbytes; as they are if not set."
    )
    adapter: str | None = _option(
        None,
        "Hub id or folder of a PEFT adapter that the LM carries. Hookpoint names stay those of the LM without it.",
    )
    device_map: str | dict | None = _option(
        None,
        "Where the LM's modules lie, as in transformers: auto, balanced, sequential, or a mapping of module to "
        "device; all on the process's device if not set.",
        device_keys=True,
    )
    max_memory: dict[str, Any] | None = _option(
        None, "With device_map: memory to use by device, such as {0: 20GiB, cpu: 60GiB}.", device_keys=True
    )
    shard: bool = _option(
        False,
        "With several processes and loss fvu: each holds a part of every layer of the LM, and gathers one layer at a "
        "time as it runs; else each holds all of it.",
    )
    attn_implementation: str | None = _option(
        None,
        "Attention implementation, as in transformers (sdpa, eager, flash_attention_2, ...); its default if not set.",
    )
    gguf_file: str | None = _option(
        None, "Name of a GGUF file in the model's folder or repo; its weights are dequantised."
    )
    trust_remote_code: bool = _option(False, "Run code that comes with the model's repo.")


@dataclass(kw_only=True)
class DataArguments:
    """The tokens that the LM reads."""

    path: str = _option(
        "EleutherAI/SmolLM2-135M-10B",
        "What `datasets.load_dataset` takes, a folder saved by `save_to_disk`, local files of one kind (a file, a "
        "folder or a glob), or a `.bin` file of token ids.",
    )
    name: str | None = _option(None, "Configuration of the dataset, the second argument of `load_dataset`.")
    split: str = _option("train", "Split to read; slices such as `train[:1000]` are allowed.")
    load_args: dict[str, Any] = _option({}, "Further arguments of `load_dataset`, such as data_files or revision.")
    streaming: bool = _option(False, "Read the dataset as it arrives instead of downloading it first.")
    text_column: str = _option(
        "text", "Column with the text; a dataset with a column `input_ids` is not tokenised again."
    )
    sample_by: Literal["document", "line", "paragraph"] = _option(
        "document", "What of a local text file is a document: all of it, each line, or what empty lines part."
    )
    separator: str | int | None = _option(
        None,
        "What stands after each document: a token of the tokenizer, or its id; EOS if not set, or SEP if there is no "
        "EOS.",
    )
    bad_rows: Literal["skip", "stop"] = _option(
        "skip",
        "What is done with rows of which no sequence can be made, such as a text that is null: they are left out and "
        "counted, or the run ends at the first.",
    )
    max_bad_rows: float = _option(
        0.01,
        "With bad_rows: skip, how many rows may be left out; below 1 a part of those read so far. With more of them "
        "the run ends.",
        minimum=0.0,
    )
    token_dtype: Literal["uint16", "uint32"] | None = _option(
        None, "Width of the ids in a `.bin` file; uint16 if not set and the vocabulary fits in it, else uint32."
    )
    ctx_len: int | None = _option(
        None, "Tokens in a sequence; the least of 2,048 and what the LM has positions for if not set.", minimum=2
    )
    max_examples: int | None = _option(
        None, "Read at most this many sequences for training; all if not set.", minimum=1
    )
    eval_examples: int = _option(
        32, "The first this many sequences are held out from training, for evaluation; 0 for none.", minimum=0
    )
    exclude_tokens: list[int] = _option([], "Token ids that train nothing and count in no metric, such as BOS.")
    shuffle_seed: int | None = _option(
        42,
        "Seed of the order of the sequences (streaming: within a buffer of 1,000); null keeps the dataset's order.",
        minimum=0,
    )
    num_proc: int | None = _option(
        None, "Processes for tokenisation; one if not set. Not used when streaming.", minimum=1
    )

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(self.path)
        if isinstance(self.separator, str) and self.separator.isdecimal():
            # On a command line a number is typed as a text.
            self.separator = int(self.separator)

    @property
    def sequence_length(self) -> int:
        """Tokens in a sequence, where no LM has a say in it."""
        return self.ctx_len or DEFAULT_CTX_LEN


@dataclass(kw_only=True)
class HeadArguments:
    """
    One entry of a recipe's `heads`: it makes one head at each hookpoint that its patterns match.

    Examples:
        ```python
        HeadArguments(hookpoints="layers.*", stride=2, k=192)
        HeadArguments(hookpoints="layers.[0-3].mlp", type="transcoder", skip_connection=True, k=64)
        ```
    """

    hookpoints: list[str] = _option(
        [],
        "Globs over module names of the LM's base model, with dots for slashes: `*`, `?` and `[012]` stay within one "
        "component, `**` crosses dots. With neither this nor `layers`, every layer's output gets a head.",
    )
    layers: list[int] = _option([], "Short for the outputs of these layers.")
    stride: int = _option(1, "Keep every n-th of the hookpoints that match, in natural order.", minimum=1)
    source: str | None = _option(
        None,
        "Transcoders only: the module whose output is read, with {0}, {1} for what the pattern's wildcards matched; "
        "the hookpoint's own input if not set.",
    )
    type: str = _option("sae", "What the head is.", choices=KINDS)
    name: str | None = _option(None, "Name among the heads of one hookpoint: it is saved as `<hookpoint>/<name>`.")
    activation: Literal["topk", "groupmax", "batchtopk", "jumprelu"] = _option(
        "topk",
        "How latents are selected: the k largest of each token; the largest of each of k groups; k a token, the "
        "largest of a process's whole micro-batch; or all above a threshold that is learnt.",
    )
    k: int = _option(
        32,
        "Latents that are active for each token; with batchtopk on average, with jumprelu what L0 aims at.",
        minimum=1,
    )
    sparsity_weight: float = _option(1.0, "With jumprelu: weight of (L0 / k - 1)^2 in the loss.", above=0.0)
    expansion_factor: int = _option(32, "Latents for each dimension of the input.", minimum=1)
    num_latents: int | None = _option(None, "Latents of the head; expansion_factor * d_in if not set.", minimum=1)
    skip_connection: bool = _option(False, "Transcoders only: add a linear map of the input to the output.")
    normalize_decoder: bool | None = _option(
        None, "Keep the decoder's rows at unit norm; true for SAEs and false for transcoders if not set."
    )
    seed: int = _option(0, "Seed of the initial weights; each hookpoint draws its own from it.", minimum=0)
    learning_rate: float | None = _option(
        None, "Learning rate of these heads; training.learning_rate if not set.", above=0.0
    )
    auxk_alpha: float = _option(
        0.0, "Weight of the AuxK loss, by which dead latents fit the residual; 0 is off.", minimum=0.0
    )
    multi_topk: bool = _option(False, "Add FVU at 4k latents to the loss, with weight 1/8.")
    k_decay_steps: int = _option(
        0, "Optimizer steps over which k falls linearly from min(10 * d_in, num_latents); 0 is off.", minimum=0
    )
    dead_after_tokens: int = _option(
        10_000_000, "A latent is dead once it has not been active for this many tokens.", minimum=1
    )

    def __post_init__(self) -> None:
        if isinstance(self.hookpoints, str):
            self.hookpoints = [self.hookpoints]

    @property
    def loss_terms(self) -> dict[str, Any]:
        """What the loss of these heads is made of, as their forward pass takes it."""
        return {name: getattr(self, name) for name in ("auxk_alpha", "multi_topk", "sparsity_weight")}


@dataclass(kw_only=True)
class LoraArguments:
    """A LoRA of the LM that is trained around spliced heads, under loss ce or kl. See arXiv:2501.19406."""

    rank: int = _option(16, "Rank of the adapter's matrices (`r` in PEFT).", minimum=1)
    alpha: float = _option(
        32.0, "The adapter's output is multiplied by alpha / rank (`lora_alpha` in PEFT).", above=0.0
    )
    target_modules: list[str] = _option(
        [],
        "Globs, as in `hookpoints`, for the linear layers that get an adapter; all in the layers behind the first "
        "hookpoint's if not set.",
    )
    learning_rate: float = _option(2e-4, "Learning rate of the adapter.", above=0.0)
    train_heads: bool = _option(False, "Train the heads as well; frozen if not set.")

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]


@dataclass(kw_only=True)
class SaeTrainingArguments:
    """How heads are trained; names are those of `transformers.TrainingArguments` wherever the thing is the same."""

    output_dir: str = _option("runs/sae", "Folder for the heads, checkpoints, logs and metrics.")
    run_name: str | None = _option(None, "Name of the run in the trackers; the last part of output_dir if not set.")
    overwrite_output_dir: bool = _option(
        False, "Start anew, and delete the heads, checkpoints and reports that a run left in output_dir; nothing else."
    )
    per_device_train_batch_size: int = _option(8, "Sequences in a batch, on each process.", minimum=1)
    gradient_accumulation_steps: int = _option(1, "Batches in an optimizer step.", minimum=1)
    micro_batches: int = _option(
        1, "Parts into which a batch's activations are cut for the heads, to bound their memory.", minimum=1
    )
    max_steps: int | None = _option(
        None, "Optimizer steps; one pass over the data if neither this nor max_tokens is set.", minimum=1
    )
    max_tokens: int | None = _option(
        None, "Tokens to read, rounded up to whole steps; the shorter of this and max_steps holds.", minimum=1
    )
    loss: Literal["fvu", "ce", "kl"] = _option(
        "fvu",
        "fvu: each head fits its own target. ce, kl: heads are spliced into the LM, and train by the cross-entropy of "
        "its next token, or by the KL divergence of its distribution from that of the LM as it was.",
    )
    fvu_weight: float = _option(
        0.0, "With ce or kl: weight of the heads' own losses (FVU, AuxK, Multi-TopK) beside it.", minimum=0.0
    )
    distribute_modules: bool = _option(
        False,
        "With several processes: each holds some of the heads, dealt by cost, and trains them on all tokens; else "
        "each holds all.",
    )
    distribute_latents: bool = _option(
        False,
        "With several processes: each holds a part of the latents of every head, for heads larger than a device.",
    )
    init_from: str | None = _option(
        None,
        "Folder or Hub repo (`name@revision` if not the main branch) from which each head starts, from the head of "
        "the same name; new heads if not set.",
    )
    optim: Literal["signum", "adam", "adam8bit", "muon"] = _option(
        "signum", "Optimizer: schedule-free sign descent, Adam, bitsandbytes' 8-bit Adam, or Muon."
    )
    learning_rate: float | None = _option(
        None,
        "Learning rate. If not set, with M latents: signum 5e-3 / sqrt(M / 2^14), adam and adam8bit "
        "2e-4 / sqrt(M / 2^14), muon 2e-3.",
        above=0.0,
    )
    lr_scheduler_type: str | None = _option(
        None,
        "A schedule of transformers (linear, cosine, constant, ...); constant for signum and linear else if not set.",
    )
    warmup_steps: float | None = _option(
        None,
        "Optimizer steps of warm-up, or below 1 a part of the run; 0 for signum if not set, else 1000 or a tenth of "
        "the run, whichever is less.",
        minimum=0.0,
    )
    max_grad_norm: float | None = _option(
        None,
        "Clip the gradient's norm, head by head; no clipping if not set. Not with signum, which steps by signs.",
        above=0.0,
    )
    max_non_finite: float = _option(
        0.01,
        "The part of an optimizer step's tokens whose activations may be NaN or infinite. They train nothing; with "
        "more of them the step is passed over, and after ten such steps in a row the run ends.",
        minimum=0.0,
    )
    seed: int = _option(
        42,
        "Seed of everything random but the heads' weights and the data's order.",
        minimum=0,
        maximum=2**32 - 1,
    )
    logging_steps: int = _option(
        10, "Optimizer steps between logged values, which are means over those steps.", minimum=1
    )
    eval_steps: int | None = _option(
        None, "Optimizer steps between evaluations on held-out sequences; only at the end if not set.", minimum=1
    )
    save_steps: int = _option(1000, "Optimizer steps between checkpoints.", minimum=1)
    save_total_limit: int | None = _option(None, "Checkpoints to keep, the newest; all if not set.", minimum=1)
    save_best: bool = _option(
        False,
        "Keep, in output_dir/best, each head as it was at the evaluation with its lowest FVU; with ce or kl all heads "
        "as they were at the lowest of that.",
    )
    resume_from_checkpoint: bool | str = _option(
        False,
        "Go on from this checkpoint folder; true is the newest complete one in output_dir, or the start if none.",
    )
    allow_changes: list[str] = _option(
        [],
        "Fields that may differ from those of the checkpoint that the run goes on from, though that changes what is "
        "trained, such as data.path or heads.k.",
    )
    push_to_hub: bool = _option(False, "Release the heads to the Hub; the repo is made before the LM is loaded.")
    hub_model_id: str | None = _option(
        None, "Repo to push to, as `name` or `user/name`; the last part of output_dir under your name if not set."
    )
    hub_private_repo: bool | None = _option(
        None, "Whether a repo that is made is private; your account's or organisation's default if not set."
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = _option(
        "every_save",
        "What is pushed when: heads at the end; at each save as well, while training goes on; with the newest "
        "checkpoint, in last-checkpoint; or with every checkpoint.",
    )
    hub_timeout: float = _option(
        3600.0,
        "Seconds that training waits for pushes when it has ended; what has not arrived by then is told, with how to "
        "push it by hand.",
        above=0.0,
    )
    report_to: list[str] = _option(["none"], "Accelerate trackers (tensorboard, wandb, ...); `none` is off.")

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise InputError("training.output_dir: it is empty. Name a folder; the present one is a dot.")
        for name in ("output_dir", "init_from", "resume_from_checkpoint"):
            if isinstance(path := getattr(self, name), str):
                setattr(self, name, os.path.expanduser(path))
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if isinstance(self.allow_changes, str):
            self.allow_changes = [self.allow_changes]


SECTIONS = {
    "model": ModelArguments,
    "data": DataArguments,
    "heads": HeadArguments,
    "lora": LoraArguments,
    "training": SaeTrainingArguments,
}


def secret_fields(arguments: Any) -> set[str]:
    """Names of the fields of a dataclass that must never reach a file or a tracker."""
    return {f.name for f in fields(arguments) if f.metadata["help"].secret}

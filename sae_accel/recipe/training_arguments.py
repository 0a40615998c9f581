"""The fields of a recipe's section `training`: the run, its steps, its optimizer, and what it writes and sends."""

import os
from dataclasses import dataclass
from typing import Literal

from ..common.errors import InputError
from .option import option as _option


@dataclass(kw_only=True)
class SaeTrainingArguments:
    """
    How the heads train. Fields have the names of `transformers.TrainingArguments` wherever they mean the same.

    Examples:
        ```python
        from sae_accel import SaeTrainingArguments

        SaeTrainingArguments(output_dir="runs/smollm2", per_device_train_batch_size=16, max_tokens=100_000_000)
        SaeTrainingArguments(output_dir="runs/smollm2", optim="adam", learning_rate=1e-4, resume_from_checkpoint=True)
        ```
    """

    output_dir: str = _option("runs/sae", "Folder for the heads, checkpoints, logs and metrics.")
    run_name: str | None = _option(None, "Name of the run in the trackers; the last part of output_dir if not set.")
    overwrite_output_dir: bool = _option(
        False,
        "Start anew: delete the heads, checkpoints and reports that an earlier run wrote in output_dir. Other files "
        "stay.",
    )
    per_device_train_batch_size: int = _option(8, "Sequences per batch, on each process.", minimum=1)
    gradient_accumulation_steps: int = _option(1, "Batches per optimizer step.", minimum=1)
    micro_batches: int = _option(
        1,
        "Number of parts into which each batch's activations are cut, to limit the memory that the heads need.",
        minimum=1,
    )
    max_steps: int | None = _option(
        None, "Number of optimizer steps; if neither this nor max_tokens is set, one pass over the data.", minimum=1
    )
    max_tokens: int | None = _option(
        None,
        "Number of tokens to read, rounded up to whole optimizer steps; not used if not set. If max_steps is set "
        "too, the run ends at the first of the two.",
        minimum=1,
    )
    loss: Literal["fvu", "ce", "kl"] = _option(
        "fvu",
        "Loss of the heads. fvu: each head reconstructs its own target. ce, kl: the heads are spliced into the LM "
        "and minimise its next-token cross-entropy, or the KL divergence from the unspliced LM.",
    )
    fvu_weight: float = _option(
        0.0,
        "With loss ce or kl: weight of the heads' own losses (FVU, AuxK, Multi-TopK), which are added to it.",
        minimum=0.0,
    )
    distribute_modules: bool = _option(
        False,
        "With several processes: each process holds some of the heads, dealt by cost, and trains them on the tokens "
        "of all processes. If false, each process holds all heads.",
    )
    distribute_latents: bool = _option(
        False,
        "With several processes: each process holds a part of the latents of every head. Use it for heads that are "
        "larger than one device.",
    )
    init_from: str | None = _option(
        None,
        "Folder or Hub repo (`name@revision` for another revision than the main branch) of trained heads: each head "
        "starts from the head of the same name. New heads if not set.",
    )
    optim: Literal["signum", "adam", "adam8bit", "muon"] = _option(
        "signum",
        "Optimizer: schedule-free sign descent (signum), Adam, Adam with 8-bit states from bitsandbytes, or Muon.",
    )
    learning_rate: float | None = _option(
        None,
        "Learning rate. If not set, for a head with M latents: signum 5e-3 / sqrt(M / 2^14), adam and adam8bit 2e-4 "
        "/ sqrt(M / 2^14), muon 2e-3.",
        above=0.0,
    )
    lr_scheduler_type: str | None = _option(
        None,
        "Learning rate schedule of transformers (linear, cosine, constant, ...). If not set, constant for signum "
        "and linear for the other optimizers.",
    )
    warmup_steps: float | None = _option(
        None,
        "Number of optimizer steps of warm-up; a value below 1 is a fraction of the run. If not set, 0 for signum, "
        "and for the other optimizers 1,000 or a tenth of the run, whichever is less.",
        minimum=0.0,
    )
    max_grad_norm: float | None = _option(
        None,
        "Largest norm of each head's gradient, to which larger gradients are clipped; no clipping if not set. Not "
        "with signum, which uses only the gradient's sign.",
        above=0.0,
    )
    max_non_finite: float = _option(
        0.01,
        "Largest fraction of an optimizer step's tokens whose activations may be NaN or infinite. These tokens "
        "train no head. If more are, the step is skipped; ten skipped steps in a row end the run.",
        minimum=0.0,
        maximum=1.0,
    )
    seed: int = _option(
        42,
        "Seed of all random numbers, except the heads' initial weights (heads.seed) and the data's order "
        "(data.shuffle_seed).",
        minimum=0,
        maximum=2**32 - 1,
    )
    logging_steps: int = _option(
        10, "Number of optimizer steps between logs. Each logged value is the mean over these steps.", minimum=1
    )
    eval_steps: int | None = _option(
        None,
        "Number of optimizer steps between evaluations on the held-out sequences; if not set, one evaluation at the "
        "end.",
        minimum=1,
    )
    save_steps: int = _option(1000, "Number of optimizer steps between checkpoints.", minimum=1)
    save_total_limit: int | None = _option(
        None, "Number of checkpoints to keep, the newest; all if not set.", minimum=1
    )
    save_best: bool = _option(
        False,
        "Keep in output_dir/best each head from the evaluation with its lowest FVU; with loss ce or kl, all heads "
        "from the evaluation with the lowest loss.",
    )
    resume_from_checkpoint: bool | str = _option(
        False,
        "Checkpoint folder to resume from; true takes the newest complete checkpoint in output_dir, or starts anew "
        "if there is none.",
    )
    allow_changes: list[str] = _option(
        [],
        "When resuming: fields whose values may differ from the checkpoint's although they change the training, "
        "such as data.path or heads.k.",
    )
    push_to_hub: bool = _option(False, "Release the heads to the Hub. The run makes the repo before it loads the LM.")
    hub_model_id: str | None = _option(
        None,
        "Hub repo to push to: `name` or `user/name`; if not set, the last part of output_dir under your user name.",
    )
    hub_private_repo: bool | None = _option(
        None, "Whether the run makes the Hub repo private; if not set, the default of your account or organisation."
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = _option(
        "every_save",
        "When to push: the heads at the end (end); the heads at each save, too (every_save); also the newest "
        "checkpoint, in last-checkpoint (checkpoint); or also every checkpoint (all_checkpoints).",
    )
    hub_timeout: float = _option(
        3600.0,
        "Seconds that the run waits at its end for unfinished pushes. If some are still unfinished, it prints how "
        "to push by hand.",
        above=0.0,
    )
    report_to: list[str] = _option(
        ["none"], "Accelerate trackers to log to (tensorboard, wandb, ...); `none` turns them off."
    )

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise InputError(
                "training.output_dir: it is empty. Name a folder: --training.output_dir runs/sae, or . for the "
                "current folder."
            )
        for name in ("output_dir", "init_from", "resume_from_checkpoint"):
            if isinstance(path := getattr(self, name), str):
                setattr(self, name, os.path.expanduser(path))
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if isinstance(self.allow_changes, str):
            self.allow_changes = [self.allow_changes]

import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping

from ..common.run_files import ADAPTER
from ..common.tables import aligned
from ..models import HeadModel


def metrics_table(heads: Mapping[str, HeadModel], metrics: Mapping[str, float]) -> str:
    """
    A table with one line per head: its size; FVU, L0 and the fraction of silent latents on held-out tokens; and the
    fraction of latents that were silent in training between the last two logs.

    Args:
        heads (`Mapping[str, HeadModel]`): Heads by name.
        metrics (`Mapping[str, float]`): The metrics of `SaeTrainer.train`.
    """
    rows = [("head", "type", "d_in -> latents -> d_out", "k", "FVU", "L0", "silent", "silent in training")]
    for name, head in heads.items():
        config = head.config
        rows.append(
            (
                name,
                config.kind,
                config.widths,
                str(config.k),
                _number(metrics.get(f"eval/fvu/{name}"), ".4f"),
                _number(metrics.get(f"eval/l0/{name}"), ".1f"),
                _number(metrics.get(f"eval/silent/{name}"), ".1%"),
                _number(metrics.get(f"train/silent/{name}"), ".1%"),
            )
        )
    title, *lines = aligned(rows)
    return "\n".join([title, "-" * max(map(len, [title, *lines])), *lines])


def losses_table(metrics: Mapping[str, float]) -> str:
    """A table of the LM's losses before and after a run with loss `ce` or `kl`; empty for other runs."""
    if "initial/ce" not in metrics:
        return ""
    rows: list[tuple[str, ...]] = [("", "before", "after")]
    heads = [key.removeprefix("initial/") for key in metrics if key.startswith("initial/fvu/")]
    for name, words in (
        ("ce_clean", "cross-entropy of the LM"),
        ("ce", "cross-entropy with the heads"),
        ("kl", "KL between the two"),
        *((head, head.replace("fvu/", "FVU of ")) for head in heads),
    ):
        rows.append((words, *(_number(metrics.get(f"{when}/{name}"), ".4f") for when in ("initial", "eval"))))
    return "\n" + "\n".join(aligned(rows)) + "\n"


def closing_message(
    folder: str,
    heads: Mapping[str, HeadModel],
    metrics: Mapping[str, float],
    with_lora: bool = False,
    warnings: Iterable[str] = (),
) -> str:
    """
    The message at the end of a run: the tables, the speed, and the next commands.

    Args:
        folder (`str`): The run's output folder.
        heads (`Mapping[str, HeadModel]`): Heads by name.
        metrics (`Mapping[str, float]`): The metrics of `SaeTrainer.train`.
        with_lora (`bool`, defaults to `False`): Whether the run trained a LoRA.
        warnings (`Iterable[str]`): Warnings about the training, one line each.
    """
    held_out = f"Measured on {metrics['eval/tokens']:,} held-out tokens. " if "eval/tokens" in metrics else ""
    rate = metrics.get("train/tokens_per_second")
    speed = "" if rate is None else f" at {rate:,.0f} tokens/s"
    logs = f"\n  {_program('tensorboard')} --logdir {folder}/logs" if os.path.isdir(f"{folder}/logs") else ""
    adapter = f" The LoRA is in {folder}/{ADAPTER}; peft can load it." if with_lora else ""
    return f"""
{metrics_table(heads, metrics)}
{losses_table(metrics)}{"".join(f"{line}{chr(10)}" for line in warnings)}
{held_out}Trained on {metrics["train/tokens"]:,} tokens{speed}.
Saved in {folder}.{adapter}

Next:{logs}
  {_program("python")} -c "from sae_accel import AutoSae; print(AutoSae.from_pretrained('{folder}'))"
  {_program("python")} -m sae_accel.push {folder} NAME --dry-run
  {_program("accelerate")} launch -m sae_accel.train --model.name_or_path gpt2 --heads.hookpoints "h.*.mlp.act"
"""


def _program(name: str) -> str:
    """A command as the user can type it: with its path, if its environment is not activated."""
    here = os.path.join(os.path.dirname(sys.executable), name)
    return name if shutil.which(name) == here else os.path.relpath(here)


def _number(value: float | None, form: str) -> str:
    return "no number" if value is None or not math.isfinite(value) else format(value, form)

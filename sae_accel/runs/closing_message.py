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
    One line for each head: its size; FVU, L0 and the part of latents that stay silent on held-out tokens; and the part
    that stayed silent in training since the log before the last.

    Args:
        heads (`Mapping[str, HeadModel]`): Heads by name.
        metrics (`Mapping[str, float]`): What `SaeTrainer.train` returned.
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
    """The LM's losses before and after a run that trained by them; nothing for other runs."""
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
    What a run ends with: the table, the speed, and the next commands.

    Args:
        folder (`str`): The run's output folder.
        heads (`Mapping[str, HeadModel]`): Heads by name.
        metrics (`Mapping[str, float]`): What `SaeTrainer.train` returned.
        with_lora (`bool`, defaults to `False`): Whether a LoRA was trained around them.
        warnings (`Iterable[str]`): Lines about what went wrong in training.
    """
    held_out = f"Measured on {metrics['eval/tokens']:,} held-out tokens. " if "eval/tokens" in metrics else ""
    rate = metrics.get("train/tokens_per_second")
    speed = "" if rate is None else f" at {rate:,.0f} tokens/s"
    logs = f"\n  {_program('tensorboard')} --logdir {folder}/logs" if os.path.isdir(f"{folder}/logs") else ""
    adapter = f" The LoRA is in {folder}/{ADAPTER}, as peft reads it." if with_lora else ""
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
    """A command as it can be typed here: with its path, if the environment that it is in has not been activated."""
    here = os.path.join(os.path.dirname(sys.executable), name)
    return name if shutil.which(name) == here else os.path.relpath(here)


def _number(value: float | None, form: str) -> str:
    return "no number" if value is None or not math.isfinite(value) else format(value, form)

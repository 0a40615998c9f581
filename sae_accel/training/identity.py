"""
The identity of a run: the settings that decide whether it may go on from a checkpoint.

Each checkpoint stores the identity of its run. Paths and names are made independent of the folder in which the user
typed them, so that only real changes count as differences.
"""

import glob
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..bank.plans import HeadPlan
from ..lm.hooks import Site
from ..recipe.arguments import LoraArguments, SaeTrainingArguments
from ..recipe.recipe import Recipe


def identity_of(
    plans: Iterable[HeadPlan],
    args: SaeTrainingArguments,
    lora: LoraArguments | None,
    model: PreTrainedModel,
    recipe: Recipe | None = None,
    rows: str | None = None,
) -> dict[str, Any]:
    """
    The settings that identify a run. Before a run goes on from a checkpoint, the two identities are compared.

    Args:
        plans (`Iterable[HeadPlan]`): All heads of the run.
        args (`SaeTrainingArguments`): How the run trains.
        lora ([`LoraArguments`], *optional*): The LoRA that the run trains.
        model (`PreTrainedModel`): The LM, or its architecture without weights.
        recipe ([`Recipe`], *optional*): The recipe, which knows more of the LM and the data than a trainer.
        rows (`str`, *optional*): The fingerprint of the training rows, once they are known.

    Returns:
        `dict[str, Any]`: the fields of the recipe by section, and in `heads` by the name of each head, in types that
        JSON can hold.
    """
    whole = {} if recipe is None else recipe.to_dict()
    told = whole.get("data", {})
    if told:
        told["path"] = _settled(told["path"])
    lm = whole.get("model", {}) | {"name_or_path": _name(model)}
    # The commit, because a branch can move.
    if (commit := getattr(model.config, "_commit_hash", None)) is not None:
        lm["revision"] = commit
    identity = {
        "heads": {plan.name: _head(plan) for plan in plans},
        "training": asdict(args),
        "lora": None if lora is None else asdict(lora),
        "model": lm,
        "data": told | ({} if rows is None else {"rows": rows}),
    }
    return json.loads(json.dumps(identity, default=str))


def _head(plan: HeadPlan) -> dict[str, Any]:
    config = plan.config
    settled = {name: getattr(config, name) for name in ("d_in", "d_out", "num_latents", "normalize_decoder")}
    return asdict(plan.arguments) | settled | {"source": _in_words(plan.reads), "target": _in_words(plan.predicts)}


def _in_words(sites: Iterable[Site]) -> str:
    return ", ".join(f"the {site.side} of {site.module}" for site in sites)


def _settled(path: str) -> str:
    """The absolute form of a path or a pattern of paths; the name of a dataset on the Hub stays as it is."""
    local = Path(path).expanduser()
    return os.path.abspath(local) if local.exists() or glob.glob(str(local), recursive=True) else path


def _name(model: PreTrainedModel) -> str:
    """An LM's name on the Hub, or the absolute path of its folder."""
    name = model.name_or_path or ""
    return str(Path(name).resolve()) if Path(name).is_dir() else name

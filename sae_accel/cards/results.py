"""The measurements of heads in a card: as metadata for machines, and as tables for readers."""

from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult

from ..models import HeadConfig
from .markdown import code, folded, table
from .run import Run


# A card with more heads than this shows their mean, lowest and highest values, and folds the table of all heads.
MANY = 16
# Each metric of a head, with its title and its format in a card.
_MEASURED = {
    "eval/fvu": ("FVU", ".4f"),
    "eval/l0": ("L0", ".1f"),
    "eval/silent": ("silent", ".1%"),
    "train/silent": ("silent in training", ".1%"),
}
_OF_HEADS = "activation-reconstruction"
_IN_METADATA = {"fvu": "FVU", "l0": "L0", "silent": "Silent latents"}
_LM_LOSSES = {
    "ce_clean": "cross-entropy of the LM",
    "ce": "cross-entropy with the heads",
    "kl": "KL divergence between the two",
}


def eval_results(run: Run, dataset: dict[str, Any]) -> list[EvalResult]:
    """
    Every metric on held-out tokens, of the heads and of the LM with the heads.

    Args:
        run ([`Run`]): The run that was measured.
        dataset (`dict[str, Any]`): The fields of each result that name the dataset.
    """

    def result(task: str, kind: str, words: str, value: float, args: dict[str, Any] | None = None) -> EvalResult:
        return EvalResult(
            task_type=task, metric_type=kind, metric_name=words, metric_value=value, metric_args=args, **dataset
        )

    heads = list(run.configs)
    found = []
    for kind, words in _IN_METADATA.items():
        measured = {name: value for name in heads if (value := run.metrics.get(f"eval/{kind}/{name}")) is not None}
        if measured and len(heads) > MANY:
            mean = f"{words}, mean of {len(measured)} heads"
            found.append(result(_OF_HEADS, kind, mean, fmean(measured.values()), {"heads": len(measured)}))
            continue
        for name, value in measured.items():
            found.append(result(_OF_HEADS, kind, f"{words} of {name}", value, {"head": name} if name else None))
    for kind, words in _LM_LOSSES.items():
        if (value := run.metrics.get(f"eval/{kind}")) is not None:
            found.append(result("text-generation", kind, words, value))
    return found


def heads_section(run: Run) -> str:
    """The table of the heads and their metrics, with a sentence on each metric."""
    parts = [_heads_table(run), _columns(run)]
    if len(run.configs) > MANY:
        parts = [_spans_table(run), _columns(run), folded(f"All {len(run.configs)} heads", _heads_table(run))]
    return "\n\n".join(part for part in parts if part)


def losses_table(run: Run) -> str:
    """The LM's losses before and after training; empty if none was measured."""
    rows = []
    for key, words in _LM_LOSSES.items():
        before, after = (run.shown(f"{when}/{key}", ".4f") for when in ("initial", "eval"))
        if before or after:
            rows.append([words, before, after])
    return table(["", "before", "after"], rows) if rows else ""


def _heads_table(run: Run) -> str:
    rows = []
    for name, config in run.configs.items():
        size = f"{config.d_in:,} → {config.num_latents:,} → {config.d_out:,}"
        k = "" if config.k is None else str(config.k)
        metrics = [run.shown(f"{key}/{name}", form) for key, (_, form) in _MEASURED.items()]
        rows.append([code(_title(name, config)), config.title, size, config.activation, k, *metrics])
    measured = [words for words, _ in _MEASURED.values()]
    return table(["name", "type", "d_in → latents → d_out", "activation", "k", *measured], rows)


def _spans_table(run: Run) -> str:
    rows = []
    for key, (words, form) in _MEASURED.items():
        if values := [run.metrics[one] for name in run.configs if (one := f"{key}/{name}") in run.metrics]:
            rows.append([words, *(format(value, form) for value in (fmean(values), min(values), max(values)))])
    return table(["", "mean", "lowest", "highest"], rows) if rows else ""


def _columns(run: Run) -> str:
    """One sentence on each metric that the table shows."""
    fvu, l0, silent, in_training = (
        any(f"{key}/{name}" in (run.metrics.keys() | run.no_number) for name in run.configs) for key in _MEASURED
    )
    on = f", on {run.metrics['eval/tokens']:,.0f} held-out tokens" if "eval/tokens" in run.metrics else ""
    sentences = {
        f"FVU: fraction of variance unexplained, the squared error over the target's variance{on}.": fvu,
        f"L0: mean number of active latents per token{', on the same tokens' if on and fvu else on}.": l0,
        f"Silent: share of the latents that are active on none of {'these' if on else 'the held-out'} tokens.": silent,
        "Silent in training: share of the latents that are active on none of the latest training tokens.": in_training,
    }
    return " ".join(sentence for sentence, applies in sentences.items() if applies)


def _title(name: str, config: HeadConfig) -> str:
    """The name of a head in the card."""
    return name or config.hookpoint or "head"

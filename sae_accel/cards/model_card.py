"""
Writes the model card of a run: the `README.md` that people read on the Hub.

The card says what the heads are, on which LM and data they were trained, how good they are, and how to load them. All
of it comes from the files in the run's folder, so the card is never out of step with them. A name that may be private,
such as the path of a local dataset, is cut to its last part. The template beside this file holds the fixed text.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..common.run_files import ADAPTER
from ..data.sources import BUILDERS
from ..recipe.arguments import KINDS
from .markdown import code, fenced, folded, listed, quoted
from .plots import FREQUENCY_PLOT, FVU_PLOT, draw_plots
from .results import eval_results, heads_section, losses_table
from .run import Run, frequencies_of, log_history, read_run


TEMPLATE = Path(__file__).with_suffix(".md")
CARD = "README.md"
# The last line of each generated card. A card without it was written by a person.
MARK = "<!-- Written by sae_accel, and anew with each release as long as this line is here. -->"
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n.*?^---[ \t]*$", re.DOTALL | re.MULTILINE)
_FILE_ENDINGS = {".bin", ".txt", *BUILDERS}
_OPTIMIZERS = {"adam": "Adam", "adam8bit": "8-bit Adam", "muon": "Muon"}
_LOSSES = {
    "fvu": "each head on its own squared error",
    "ce": "end to end, on the cross-entropy of the LM with the heads spliced in",
    "kl": "end to end, on the KL divergence of the LM with the heads spliced in from the LM without them",
}
_PAPERS = {
    "topk": ("TopK SAEs", "Gao et al. 2024", "2406.04093"),
    "batchtopk": ("BatchTopK", "Bussmann et al. 2024", "2412.06410"),
    "jumprelu": ("JumpReLU", "Rajamanoharan et al. 2024", "2407.14435"),
}
_LORA_PAPER = ("LoRA around SAEs", "Chen et al. 2025", "2501.19406")
_ALT_TEXTS = {
    FVU_PLOT: "FVU on training tokens against the number of these tokens, one curve per head",
    FREQUENCY_PLOT: "Histogram of how often latents are active, on a logarithmic scale, one per head",
}


def write_card(
    folder: Path,
    repo_id: str | None = None,
    license: str | None = None,
    include: Sequence[str] = (),
    into: Path | None = None,
    revision: str | None = None,
    among_others: bool = False,
) -> Path:
    """
    Writes the model card of a run's heads, and its plots, from the files in the run's folder. The same files give the
    same bytes. A card that a person wrote stays as it is.

    Args:
        folder (`Path`): The folder of the heads. `recipe.yaml`, `metrics.json`, `log_history.jsonl`,
            `latent_frequency.safetensors` and `adapter` are used if they exist.
        repo_id (`str`, *optional*): Repo that the card's snippet loads from; the folder if not given.
        license (`str`, *optional*): The Hub's identifier of the heads' license; the card names none if not given.
        include (`Sequence[str]`, *optional*): Globs over the names of heads; all heads if not given.
        into (`Path`, *optional*): Folder to write into; the run's folder if not given.
        revision (`str`, *optional*): Branch of the repo that the card's snippet loads from.
        among_others (`bool`): Whether the repo has other heads too, so that the snippet must name the heads.

    Returns:
        `Path`: the card, `README.md`.

    Raises:
        `InputError`: if the folder has no head, or a file in it cannot be read.

    Examples:
        ```python
        from pathlib import Path

        from sae_accel.cards import write_card

        card = write_card(Path("runs/quickstart"), repo_id="user/my-saes", license="mit", into=Path("card"))
        print(card.read_text())
        ```
    """
    folder = Path(folder)
    into = folder if into is None else into
    run = read_run(folder, include)
    # Drawn in any case: a card that a person wrote may show the plots too.
    draw_plots(into, list(run.configs), log_history(run), frequencies_of(run))
    if (folder / CARD).is_file() and not is_ours(folder / CARD):
        return folder / CARD
    title = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    card = ModelCard.from_template(
        _metadata(run, repo_id or title, license),
        template_path=str(TEMPLATE),
        title=title,
        about=_about(run),
        many=len(run.configs) > 1,
        heads=heads_section(run),
        losses=losses_table(run),
        plots=[(file, alt) for file, alt in _ALT_TEXTS.items() if (into / file).is_file()],
        adapter=_adapter_snippet(run, repo_id, revision, among_others),
        recipe=run.recipe_text and folded("Recipe", fenced(run.recipe_text, "yaml")),
        credits=_credits(run),
        mark=MARK,
        **_snippet_values(run, repo_id, revision, among_others),
    )
    card.save(into / CARD)
    return into / CARD


def is_ours(card: Path) -> bool:
    """Whether a card was generated, so that it may be replaced."""
    return MARK in card.read_text(encoding="utf-8", errors="replace")


def is_somebodys(card: Path) -> bool:
    """Whether a person wrote a text into a card. The card that the Hub makes for a license has no text."""
    text = card.read_text(encoding="utf-8", errors="replace")
    return MARK not in text and bool(_FRONT_MATTER.sub("", text).strip())


def _metadata(run: Run, model_name: str, license: str | None) -> ModelCardData:
    lms = [lm for lm in _lms(run) if _is_hub_id(lm, run)]
    dataset = _dataset_id(run)
    data = run.section("data")
    measured_on: dict[str, Any] = {
        "dataset_type": dataset or "unspecified",
        "dataset_name": f"{_shown(data['path'], run)}, held out" if data.get("path") else "held-out tokens",
        "dataset_config": data.get("name"),
        "dataset_split": data.get("split"),
        "dataset_revision": (data.get("load_args") or {}).get("revision"),
    }
    results = eval_results(run, measured_on)
    kinds = sorted({config.tag for config in run.configs.values()})
    return ModelCardData(
        library_name="sae_accel",
        license=license,
        base_model=lms[0] if len(lms) == 1 else lms or None,
        datasets=[dataset] if dataset else None,
        tags=[*kinds, "mechanistic-interpretability", "sae_accel"],
        model_name=model_name if results else None,
        eval_results=results or None,
    )


def _about(run: Run) -> str:
    """The first paragraph: the heads, their LM, their data, and how they were trained."""
    in_order = sorted(
        run.configs.values(), key=lambda config: (list(KINDS).index(config.kind), config.skip_connection)
    )
    kinds = Counter(config.long_titles for config in in_order)
    counts = [f"a {one}" if count == 1 else f"{count} {many}" for (one, many), count in kinds.items()]
    what = listed(counts)
    sentence = f"{what[0].upper()}{what[1:]}{_of_lm(run)}."
    return " ".join(part for part in (sentence, _how_trained(run)) if part)


def _of_lm(run: Run) -> str:
    model = run.section("model")
    lms = [code(_shown(lm, run)) for lm in _lms(run)]
    if not lms:
        return " for the activations of a language model"
    parts = [f" on the activations of {listed(lms)}"]
    if (revision := _revision(run)) and len(lms) == 1:
        parts.append(f" at revision {code(revision)}")
    if model.get("quantization"):
        parts.append(f" in {model['quantization']}")
    if model.get("adapter"):
        parts.append(f" with the adapter {code(_shown(model['adapter'], run))}")
    return "".join(parts)


def _how_trained(run: Run) -> str:
    data, training = run.section("data"), run.section("training")
    tokens = run.metrics.get("train/tokens")
    parts = [f" on {tokens:,.0f} tokens" if tokens else ""]
    if data.get("path"):
        config = f" ({data['name']})" if data.get("name") else ""
        parts.append(f"{' of' if tokens else ' on'} {code(_shown(data['path'], run))}{config}")
    if data.get("ctx_len"):
        parts.append(f", in sequences of {data['ctx_len']:,} tokens")
    if optimizer := training.get("optim"):
        rate = f" at a learning rate of {training['learning_rate']}" if training.get("learning_rate") else ""
        parts.append(f", with {_OPTIMIZERS.get(optimizer, optimizer)}{rate}")
    if training.get("loss") in _LOSSES:
        parts.append(f": {_LOSSES[training['loss']]}")
    if training.get("init_from"):
        parts.append(f", starting from the heads of {code(_shown(training['init_from'], run))}")
    return f"Trained{''.join(parts)}." if any(parts) else ""


def _snippet_values(run: Run, repo_id: str | None, revision: str | None, among_others: bool) -> dict[str, Any]:
    """Values of the loading snippet: how to load the first head, and the place in the LM that it reads."""
    name, config = next(iter(run.configs.items()))
    places = config.reads_at(config.hookpoint or name.split("/")[0], config.source)
    read = " and ".join(f"the {side} of module {module}" for module, side in places if module)
    lm = next((f"AutoModel.from_pretrained({quoted(lm)})" for lm in _lms(run) if _is_hub_id(lm, run)), "the LM")
    which = f", hookpoint={quoted(name)}" if among_others and len(run.configs) == 1 else ""
    return {
        "source": f"{_source(run, repo_id)}{which}{_at(revision)}",
        "head": quoted(name),
        "reads": f"{read} of {lm}" if read else f"activations of {lm}",
        "d_in": config.d_in,
        "decodes": not config.encoder_only,
    }


def _adapter_snippet(run: Run, repo_id: str | None, revision: str | None, among_others: bool) -> str:
    if not run.has_adapter:
        return ""
    lm, source, at = next(iter(_lms(run)), "the LM"), _source(run, repo_id), _at(revision)
    heads = f"AutoSae.from_pretrained({source}{at})"
    if among_others:
        heads += f".select({', '.join(map(quoted, run.configs))})"
    lines = [
        "from peft import PeftModel",
        "from sae_accel import AutoSae, splice",
        "from transformers import AutoModelForCausalLM",
        "",
        f"lm = AutoModelForCausalLM.from_pretrained({quoted(_shown(lm, run))})",
        f'lm = PeftModel.from_pretrained(lm, {source}, subfolder="{ADAPTER}"{at})',
        f"with splice(lm.get_base_model(), {heads}):",
        "    logits = lm(input_ids).logits",
    ]
    return "\n".join(lines)


def _source(run: Run, repo_id: str | None) -> str:
    return quoted(repo_id or run.folder.as_posix())


def _at(revision: str | None) -> str:
    return f", revision={quoted(revision)}" if revision else ""


def _credits(run: Run) -> str:
    configs = run.configs.values()
    activations = {config.activation for config in configs}
    if activations & {"groupmax", "signed_topk", "batchtopk"}:
        activations.add("topk")
    papers = [paper for activation, paper in _PAPERS.items() if activation in activations]
    papers += dict.fromkeys(config.paper for config in configs if config.paper)
    papers += [_LORA_PAPER] if run.has_adapter else []
    credits = [f"- {what}: {who}, [arXiv:{number}](https://arxiv.org/abs/{number})." for what, who, number in papers]
    return "\n".join(["- Saved and loaded by the Python package `sae_accel`.", *credits])


def _lms(run: Run) -> list[str]:
    """The LMs whose activations the heads read, under the names that they were loaded by."""
    named = dict.fromkeys(config.base_model_name_or_path for config in run.configs.values())
    return [lm for lm in named if lm] or [lm for lm in [run.section("model").get("name_or_path")] if lm]


def _revision(run: Run) -> str | None:
    revisions = {config.base_model_revision for config in run.configs.values()}
    return revisions.pop() if len(revisions) == 1 and None not in revisions else run.section("model").get("revision")


def _dataset_id(run: Run) -> str | None:
    data = run.section("data")
    path = data.get("path")
    # A builder of datasets, such as json, has a name like an old repo's. It is recognised by its files.
    builder = path and "/" not in path and {"data_files", "data_dir"} & set(data.get("load_args") or {})
    return path if path and not builder and _is_hub_id(path, run) else None


def _is_hub_id(name: str, run: Run) -> bool:
    """Whether a name is a repo's: it has the form of one, and no file or folder of this name is nearby."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    here = run.folder.resolve()
    # The run may have started in another folder than the one in which its card is written.
    places = [root / name for root in (Path.cwd(), *here.parents)]
    return Path(name).suffix not in _FILE_ENDINGS and not any(
        place.exists() for place in places if place not in (here, *here.parents)
    )


def _shown(name: str, run: Run) -> str:
    """A repo's whole name, or the last part of a path, since the rest means nothing on another machine."""
    return name if _is_hub_id(name, run) else Path(name).name or name

"""
Plans of heads: from patterns in a recipe to modules of an LM, with the widths of their activations.

An entry names modules by patterns. Here each pattern is matched with the LM's modules, and one short forward pass,
which may run on the meta device, finds the width at each site. So every mistake in `heads` is found before weights are
loaded.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel

from ..common.errors import InputError
from ..lm.hooks import Site, base_of
from ..lm.modules import hookpoint_names, layer_list, match_modules
from ..lm.other_names import near_names, no_match
from ..lm.probe import probe
from ..models import HeadConfig
from ..models.registry import config_of_kind
from ..recipe.arguments import HeadArguments
from ..recipe.checks import check_latents


@dataclass(frozen=True)
class HeadPlan:
    """
    A head to make: where it reads, what it should reproduce, and its settings.

    Args:
        name (`str`): `<hookpoint>` or `<hookpoint>/<name>`, the folder in which the head is saved.
        hookpoint (`str`): Module of the base model at which the head sits.
        reads (`tuple[Site, ...]`): The sites of its input. Activations of several sites are joined.
        predicts (`tuple[Site, ...]`): The sites of its target; `reads` for an SAE.
        widths (`dict[Site, int]`): Width of the activation at each site.
        config (`HeadConfig`): Config of the head.
        arguments (`HeadArguments`): The recipe's entry, with the settings of training.
    """

    name: str
    hookpoint: str
    reads: tuple[Site, ...]
    predicts: tuple[Site, ...]
    widths: dict[Site, int]
    config: HeadConfig
    arguments: HeadArguments


def site_widths(plans: Iterable[HeadPlan]) -> dict[Site, int]:
    """Every site that some head reads or predicts, once, with the width of its activations."""
    return {site: width for plan in plans for site, width in plan.widths.items()}


def plan_heads(model: PreTrainedModel, entries: list[HeadArguments], spliced: bool = False) -> list[HeadPlan]:
    """
    Turns the entries of a recipe into plans of heads, with one short forward pass of the LM, which may lie on the meta
    device.

    Args:
        model (`PreTrainedModel`): The LM, or one of its architecture.
        entries (`list[HeadArguments]`): The recipe's `heads`.
        spliced (`bool`, defaults to `False`): Whether the heads train together, spliced into the LM.

    Returns:
        `list[HeadPlan]`: in the order of the entries, and within an entry in the order of the LM's modules.

    Raises:
        `InputError`: if a pattern matches nothing, a module has no activation, sizes disagree, two heads share a name,
        or heads cannot be spliced in.
    """
    base_model = base_of(model)
    names = hookpoint_names(base_model)
    found = [wanted for i, entry in enumerate(entries) for wanted in _wanted(entry, i, base_model, names)]
    probed = probe(base_model, list(dict.fromkeys(site for one in found for site in (*one.reads, *one.predicts))))
    plans: dict[str, HeadPlan] = {}
    origins: dict[str, str] = {}
    for wanted in found:
        if wanted.name in plans:
            raise InputError(
                f"Two heads are called {wanted.name!r}, one of {origins[wanted.name]} and one of {wanted.where}. Set "
                "`name` in one of the two."
            )
        plans[wanted.name] = _plan(wanted, probed, model)
        origins[wanted.name] = wanted.where
    if spliced:
        _check_spliced(plans.values())
    return list(plans.values())


class _Wanted(NamedTuple):
    """A head that an entry asks for at one hookpoint, before the widths are known."""

    where: str
    entry: HeadArguments
    hookpoint: str
    source: str | None
    reads: tuple[Site, ...]
    predicts: tuple[Site, ...]

    @property
    def name(self) -> str:
        return f"{self.hookpoint}/{self.entry.name}" if self.entry.name else self.hookpoint


def _plan(wanted: _Wanted, probed: dict[Site, tuple[Site, int]], model: PreTrainedModel) -> HeadPlan:
    entry, hookpoint = wanted.entry, wanted.hookpoint
    reads, predicts = (tuple(probed[site][0] for site in sites) for sites in (wanted.reads, wanted.predicts))
    widths = dict(probed[site] for site in (*wanted.reads, *wanted.predicts))
    uncounted = [site.module for site in widths if site.within is not None]
    # A module's own input and output match row by row, even if it runs several times.
    if uncounted and (entry.source is not None or len({site.module for site in widths}) > 1):
        raise InputError(
            f"{wanted.where}.source: {uncounted[0]!r} may run any number of times in a forward pass, so the "
            f"output of {reads[0].module!r} cannot be matched with {hookpoint!r}. Remove source."
        )
    d_in, d_out = (sum(widths[site] for site in part) for part in (reads, predicts))
    num_latents = entry.num_latents or entry.expansion_factor * d_in
    check_latents(entry.k, num_latents, entry.activation, entry.multi_topk, f"{wanted.where} at {hookpoint!r}")
    told = {
        "hookpoint": hookpoint,
        "source": wanted.source,
        "base_model_name_or_path": model.config.name_or_path or None,
        "base_model_revision": getattr(model.config, "_commit_hash", None),
    }
    config = config_of_kind(entry.type).from_entry(entry, d_in=d_in, d_out=d_out, num_latents=num_latents, **told)
    return HeadPlan(wanted.name, hookpoint, reads, predicts, widths, config, entry)


def _check_spliced(plans: Iterable[HeadPlan]) -> None:
    """
    Refuses heads that cannot be spliced in: two at one hookpoint, or one whose module may run any number of times, or
    one that does not predict exactly the output of its hookpoint.
    """
    seen: dict[str, str] = {}
    for plan in plans:
        if plan.hookpoint in seen:
            raise InputError(
                f"training.loss: heads {seen[plan.hookpoint]!r} and {plan.name!r} would both replace the output of "
                f"{plan.hookpoint!r}. With ce or kl a hookpoint takes one head; train the other in another run."
            )
        seen[plan.hookpoint] = plan.name
        if len(plan.reads) > 1 or [site[:2] for site in plan.predicts] != [(plan.hookpoint, "output")]:
            raise InputError(
                f"training.loss: head {plan.name!r} does not read one activation to replace the output of its "
                "hookpoint, so it cannot be spliced in. Set --training.loss fvu."
            )
        if plan.predicts[0].within is not None:
            raise InputError(
                f"training.loss: {plan.hookpoint!r} may run any number of times in a forward pass, so no head can be "
                "spliced in for it. Set --training.loss fvu, or use another hookpoint."
            )


def _wanted(entry: HeadArguments, index: int, base_model: PreTrainedModel, names: list[str]) -> Iterator[_Wanted]:
    """The heads of an entry, one at each of its hookpoints."""
    kind, seen = config_of_kind(entry.type), set()
    for matches in _matches(entry, index, base_model, names):
        for hookpoint, wildcards in matches[:: entry.stride]:
            if hookpoint in seen:
                continue
            seen.add(hookpoint)
            source = None if entry.source is None else _source(entry.source, wildcards, index, base_model, names)
            reads = tuple(Site(*place) for place in kind.reads_at(hookpoint, source))
            predicts = tuple(Site(*place) for place in kind.predicts_at(hookpoint))
            yield _Wanted(f"heads[{index}]", entry, hookpoint, source, reads, predicts)


def _matches(
    entry: HeadArguments, index: int, base_model: PreTrainedModel, names: list[str]
) -> Iterator[list[tuple[str, list[str]]]]:
    """The matches of each pattern of an entry. A stride counts within one pattern, so it drops no pattern."""
    for pattern in entry.hookpoints:
        if not (matches := list(match_modules(pattern, names))):
            raise InputError(no_match(f"heads[{index}].hookpoints", pattern, "module", base_model, names))
        yield matches
    if not entry.hookpoints:
        layers = layer_list(base_model)
        count = len(list(base_model.get_submodule(layers).children()))
        if wrong := [layer for layer in entry.layers if not 0 <= layer < count]:
            raise InputError(
                f"heads[{index}].layers: {type(base_model).__name__} has no layer {wrong[0]}; it has 0 to {count - 1}."
            )
        yield [(f"{layers}.{layer}", [str(layer)]) for layer in entry.layers or range(count)]


def _source(source: str, wildcards: list[str], index: int, base_model: PreTrainedModel, names: list[str]) -> str:
    try:
        name = source.format(*wildcards)
    except (IndexError, KeyError, ValueError) as error:
        raise InputError(
            f"heads[{index}].source: {source!r} asks for a wildcard that the pattern does not have ({error}); it has "
            f"{len(wildcards)}, counted from {{0}}."
        ) from error
    if name not in names:
        raise InputError(
            f"heads[{index}].source: the LM has no module {name!r}. {near_names(name, base_model, names)}"
        )
    return name

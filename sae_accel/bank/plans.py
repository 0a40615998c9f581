from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..common.errors import InputError
from ..lm.hooks import Site
from ..lm.modules import closest, hookpoint_names, layer_list, match_modules, no_match
from ..lm.probe import probe
from ..models import HeadConfig, SaeConfig, TranscoderConfig
from ..recipe.arguments import HeadArguments
from ..recipe.checks import check_latents


@dataclass(frozen=True)
class HeadPlan:
    """
    A head to be made: where it reads, what it should reproduce, and with which settings.

    Args:
        name (`str`): `<hookpoint>` or `<hookpoint>/<name>`, the folder that it is saved in.
        hookpoint (`str`): Module of the base model at which it sits.
        reads (`Site`): Where its input comes from.
        predicts (`Site`): Where its target comes from; `reads` for an SAE.
        config (`HeadConfig`): What it is.
        arguments (`HeadArguments`): How it is trained.
    """

    name: str
    hookpoint: str
    reads: Site
    predicts: Site
    config: HeadConfig
    arguments: HeadArguments

    @property
    def sites(self) -> tuple[Site, Site]:
        """Where it reads and what it predicts."""
        return self.reads, self.predicts


def site_widths(plans: Iterable[HeadPlan]) -> dict[Site, int]:
    """Every site that some head reads or predicts, once, with the width of its activations."""
    plans = list(plans)
    return {plan.reads: plan.config.d_in for plan in plans} | {plan.predicts: plan.config.d_out for plan in plans}


def plan_heads(model: PreTrainedModel, entries: list[HeadArguments]) -> list[HeadPlan]:
    """
    Turns the entries of a recipe into heads, by one short forward pass of the LM, which may lie on the meta device.

    Args:
        model (`PreTrainedModel`): The LM, or one of its architecture.
        entries (`list[HeadArguments]`): The recipe's `heads`.

    Returns:
        `list[HeadPlan]`: in the order of the entries, within each in the order of the LM's modules.

    Raises:
        `InputError`: if a pattern matches nothing, a module has no activation, sizes disagree or two heads share a
        name.
    """
    base_model = model.base_model
    names = hookpoint_names(base_model)
    found = [
        (f"heads[{i}]", entry, *sites)
        for i, entry in enumerate(entries)
        for sites in _sites(entry, i, base_model, names)
    ]
    probed = probe(base_model, list(dict.fromkeys(site for _, _, _, *sites in found for site in sites)))
    plans: dict[str, HeadPlan] = {}
    origins: dict[str, str] = {}
    for where, entry, hookpoint, reads, predicts in found:
        name = f"{hookpoint}/{entry.name}" if entry.name else hookpoint
        if name in plans:
            raise InputError(
                f"Two heads are called {name!r}, one of {origins[name]} and one of {where}. Set `name` in one of them."
            )
        reads, d_in = probed[reads]
        predicts, d_out = probed[predicts]
        if entry.source is not None and (reads.within or predicts.within):
            raise InputError(
                f"{where}.source: {(reads if reads.within else predicts).module!r} may run any number of times in a "
                f"forward pass, so what {reads.module!r} gives cannot be matched with {hookpoint!r}. Remove source."
            )
        config = _head_config(entry, hookpoint, reads, d_in, d_out, f"{where} at {hookpoint!r}")
        plans[name] = HeadPlan(name, hookpoint, reads, predicts, config, entry)
        origins[name] = where
    return list(plans.values())


def _sites(entry: HeadArguments, index: int, base_model, names: list[str]) -> Iterator[tuple[str, Site, Site]]:
    """The hookpoints of an entry, each with where its head reads and what it predicts."""
    seen = set()
    for matches in _matches(entry, index, base_model, names):
        for hookpoint, wildcards in matches[:: entry.stride]:
            if hookpoint in seen:
                continue
            seen.add(hookpoint)
            predicts = Site(hookpoint, "output")
            if entry.type == "sae":
                yield hookpoint, predicts, predicts
            elif entry.source is None:
                yield hookpoint, Site(hookpoint, "input"), predicts
            else:
                yield hookpoint, Site(_source(entry.source, wildcards, index, names), "output"), predicts


def _matches(entry: HeadArguments, index: int, base_model, names: list[str]) -> Iterator[list[tuple[str, list[str]]]]:
    """For each pattern of an entry, what it matches; a stride counts within one pattern, so it drops no pattern."""
    for pattern in entry.hookpoints:
        if not (matches := list(match_modules(pattern, names))):
            raise InputError(no_match(f"heads[{index}].hookpoints", pattern, "module", base_model, names))
        yield matches
    if not entry.hookpoints:
        layers = layer_list(base_model)
        count = len(base_model.get_submodule(layers))
        if wrong := [layer for layer in entry.layers if not 0 <= layer < count]:
            raise InputError(
                f"heads[{index}].layers: {type(base_model).__name__} has no layer {wrong[0]}; it has 0 to {count - 1}."
            )
        yield [(f"{layers}.{layer}", [str(layer)]) for layer in entry.layers or range(count)]


def _source(source: str, wildcards: list[str], index: int, names: list[str]) -> str:
    try:
        name = source.format(*wildcards)
    except (IndexError, KeyError, ValueError) as error:
        raise InputError(
            f"heads[{index}].source: {source!r} asks for a wildcard that the pattern does not have ({error}); it has "
            f"{len(wildcards)}, counted from {{0}}."
        ) from error
    if name not in names:
        raise InputError(f"heads[{index}].source: the LM has no module {name!r}. {closest(name, names)}")
    return name


def _head_config(entry, hookpoint: str, reads: Site, d_in: int, d_out: int, where: str) -> HeadConfig:
    num_latents = entry.num_latents or entry.expansion_factor * d_in
    check_latents(entry.k, num_latents, entry.activation, entry.multi_topk, where)
    kwargs = dict(
        d_in=d_in,
        num_latents=num_latents,
        expansion_factor=entry.expansion_factor,
        k=entry.k,
        activation=entry.activation,
        hookpoint=hookpoint,
        source=entry.source and reads.module,
    )
    if entry.type == "sae":
        return SaeConfig(normalize_decoder=entry.normalize_decoder is not False, **kwargs)
    return TranscoderConfig(d_out=d_out, skip_connection=entry.skip_connection, **kwargs)

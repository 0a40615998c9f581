"""
Heads that start from pretrained ones (`training.init_from`) instead of random weights.

Each head takes the weights of the head with the same name in a folder or repo. First everything is compared by config,
without loading weights, so that a mismatch ends the run early. Then weights are loaded one head at a time. Every
process reads the same commit of a repo. Decoder rows that are not at norm 1, although the run keeps them there, are
scaled to norm 1, and their norms move into the encoder, so that a latent's contribution stays the same.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate.logging import get_logger

from ..common.errors import InputError
from ..common.hub_answers import AccessRefused
from ..common.tables import aligned
from ..loading.auto import AutoSae
from ..loading.sae_heads import SaeHeads
from ..models import HeadConfig, HeadModel
from ..models.latent_selection import SELECTIONS
from ..ops.finite import first_non_finite
from ..ops.rows import normalize_rows_
from ..processes.agreement import gather_objects, raise_together
from .bank import SaeBank
from .plans import HeadPlan


# Fields of a config in which both heads must agree, with advice if they do not.
_SAME = {
    "d_in": "Use heads of this LM.",
    "d_out": "Use heads of this LM.",
    "num_latents": "Set --heads.num_latents or --heads.expansion_factor.",
    "activation": "Set --heads.activation.",
    "skip_connection": "Set --heads.skip_connection.",
}
# Rows within this distance of norm 1 differ from it only by the rounding of half precision.
_UNIT_NORM_TOLERANCE = 1e-2
_FAR_FROM_UNIT_NORM = 0.1
logger = get_logger(__name__)


class Match(NamedTuple):
    """
    A head of a run, and the pretrained head that it starts from.

    Args:
        plan (`HeadPlan`): The head of the run.
        name (`str`): The name of the pretrained head in its folder or repo.
        config (`HeadConfig`): The config of the pretrained head.
    """

    plan: HeadPlan
    name: str
    config: HeadConfig


def match_heads(plans: Iterable[HeadPlan], heads: SaeHeads) -> list[Match]:
    """
    Finds the pretrained head of the same name for each head of a run, and checks that it fits. No weights are loaded.

    Args:
        plans (`Iterable[HeadPlan]`): The heads of the run.
        heads ([`SaeHeads`]): The pretrained heads of a folder or repo.

    Raises:
        `InputError`: if a head has no counterpart, or its type or shape differs.
    """
    plans = list(plans)
    with _of_init_from():
        return _matches(plans, heads)


def _matches(plans: list[HeadPlan], heads: SaeHeads) -> list[Match]:
    names = {plan.name: _same_name(plan, plans, heads) for plan in plans}
    if missing := [name for name, found in names.items() if found is None]:
        there = ", ".join(repr(name) for name in heads)
        raise InputError(
            f"{heads.origin!r} has no head for {', '.join(map(repr, missing))}. It holds {there}. "
            "Name the same hookpoints, or remove the entry."
        )
    found = {plan.name: name for plan in plans if (name := names[plan.name]) is not None}
    matches = [Match(plan, found[plan.name], heads.config(found[plan.name])) for plan in plans]
    for match in matches:
        _check_same(match, heads)
    return matches


def matches_table(matches: list[Match], heads: SaeHeads) -> str:
    """
    A table with one line per head of the run: the pretrained head that it starts from, and the values that the run
    changes.

    Args:
        matches (`list[Match]`): The heads.
        heads ([`SaeHeads`]): The pretrained heads of a folder or repo.
    """
    rows = [("head", "starts from", "type", "d_in -> latents -> d_out", "k", "trained on")]
    for plan, name, config in matches:
        ours = plan.config
        rows.append(
            (
                plan.name,
                name or "(the only one)",
                config.kind,
                config.widths,
                str(ours.k) if ours.k == config.k else f"{config.k} -> {ours.k}",
                config.base_model_name_or_path or "-",
            )
        )
    used = {match.name for match in matches}
    unused = [name for name in heads if name not in used]
    last = [f"Not used: {', '.join(unused)}."] if unused else []
    return "\n".join([f"Heads start from {heads.origin}:", *aligned(rows), *last])


def load_into(bank: SaeBank, matches: list[Match], heads: SaeHeads) -> None:
    """
    Copies pretrained weights into the heads of a bank, one head at a time.

    Args:
        bank ([`SaeBank`]): The heads of this process.
        matches (`list[Match]`): The heads of the run.
        heads ([`SaeHeads`]): The pretrained heads of a folder or repo.

    Raises:
        `InputError`: if a pretrained head has no decoder, has a NaN or infinite number, or cannot be read.
    """
    by_name = dict(bank.named_heads())
    for plan, name, _ in matches:
        head = by_name.get(plan.name)
        if head is None:
            continue  # Another process holds it.
        with _of_init_from():
            pretrained = heads.load(name)
        if pretrained.W_dec is None:
            raise InputError(
                f"training.init_from: head {name!r} of {heads.origin!r} holds no decoder, so it cannot train."
            )
        if words := first_non_finite(pretrained.state_dict().items()):
            raise InputError(f"training.init_from: head {name!r} of {heads.origin!r} cannot train: {words}.")
        if pretrained.config.normalize_input is not None:
            raise InputError(
                f"training.init_from: head {name!r} of {heads.origin!r} normalises its input, which training does not "
                "support. Use another."
            )
        if head.config.normalize_decoder and head.decoder_rows.requires_grad:
            _warn_of_norms(pretrained, name)
            _fold_norms(pretrained)
        head.load_whole(pretrained.state_dict())
        head.config.apply_b_dec_to_input = pretrained.config.apply_b_dec_to_input


def _warn_of_norms(head: HeadModel, name: str) -> None:
    far = (head.decoder_rows.norm(dim=-1) - 1).abs().max().item()
    if far > _FAR_FROM_UNIT_NORM and SELECTIONS[head.config.activation].counts:
        logger.warning(
            f"training.init_from: decoder rows of head {name!r} differ from norm 1 by up to {far:.2g}. The run scales "
            "them to norm 1, so that the head selects other latents. Set --heads.normalize_decoder false to keep them."
        )


@torch.no_grad()
def _fold_norms(head: HeadModel) -> None:
    """
    Scales decoder rows to norm 1 and multiplies the encoder and the threshold by their old norms. With topk-like
    selection the order of latents may change; the contribution of an active latent does not.
    """
    norms = head.decoder_rows.norm(dim=-1)
    if (norms - 1).abs().max() > _UNIT_NORM_TOLERANCE and norms.min() > 0:
        head.encoder.weight.mul_(norms[:, None])
        head.encoder.bias.mul_(norms)
        if "threshold" in head.state_dict():
            head.threshold.mul_(norms)
        normalize_rows_(head.decoder_rows)


def _same_name(plan: HeadPlan, plans: list[HeadPlan], heads: SaeHeads) -> str | None:
    if plan.name in heads:
        return plan.name
    # A single head at the top level of its folder has no name there, but its config may name a hookpoint.
    if list(heads) == [""] and len(plans) == 1 and heads.config("").hookpoint in (None, plan.hookpoint):
        return ""
    return None


def _check_same(match: Match, heads: SaeHeads) -> None:
    plan, name, config = match
    ours, where = plan.config, f"head {name!r} of {heads.origin!r}"
    if ours.model_type != config.model_type:
        kinds = [one.kind for one in (config, ours)]
        raise InputError(
            f"{where} is of type {kinds[0]}, but the recipe's {plan.name!r} is of type {kinds[1]}. Set --heads.type "
            f"{kinds[0]}."
        )
    for field, advice in _SAME.items():
        found, wanted = (getattr(one, field, None) for one in (config, ours))
        if found != wanted:
            raise InputError(f"{where} has {field} {found}, but the recipe's {plan.name!r} has {wanted}. {advice}")


def open_pretrained(init_from: str, token: str | None = None) -> SaeHeads:
    """
    The heads of a folder or repo, in float32, at the same commit on every process. Every process must call this
    function.

    Args:
        init_from (`str`): A folder; or a repo, with `@` and a branch, tag or commit if it is not the main branch.
        token (`str`, *optional*): Hub token for a private repo.

    Raises:
        `InputError`: on every process, if the folder or repo does not exist or holds no head.
    """
    heads = raise_together(lambda: _open(init_from, token))
    commits = gather_objects(heads.commit)
    if len(set(commits)) == 1:
        return heads
    return raise_together(lambda: _open(f"{heads.origin}@{commits[0]}", token))


def at_its_commit(heads: SaeHeads) -> str:
    """The folder or repo of heads in the form of `init_from`, with the commit that was opened."""
    return heads.origin if heads.commit is None else f"{heads.origin}@{heads.commit}"


def _open(init_from: str, token: str | None) -> SaeHeads:
    name, _, revision = (init_from, "", "") if os.path.exists(init_from) else init_from.partition("@")
    with _of_init_from():
        return AutoSae.open(name, dtype=torch.float32, revision=revision or None, token=token)


@contextmanager
def _of_init_from() -> Iterator[None]:
    try:
        yield
    except AccessRefused as error:
        raise InputError(f"training.init_from: {error.reason} Set --model.token, or run `hf auth login`.") from error
    except InputError as error:
        raise InputError(f"training.init_from: {error}") from error

"""
Helps a user who names a module that the LM does not have.

Wrong names are often a hook of TransformerLens (`blocks.3.hook_resid_post`), a module of another LM (`h.3.attn`), or a
name with a prefix too many (`model.layers.3`). The functions here answer with one sentence for the error message: the
module of this LM that means the same, or else the names with the most similar spelling.
"""

import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..common.globs import glob_to_regex
from ..formats.hook_names import inner_names
from .modules import closest, layer_list, match_modules


# A layer's number, or a glob for several.
_LAYER = r"(?P<layer>\d+|[\d*?!\[\]-]+)"
_LENS = re.compile(rf"blocks\.{_LAYER}\.(?P<hook>(?:\w+\.)*hook_\w+)")
_IN_A_LAYER = re.compile(rf"(?:.*\.)?(?:layers?|h|blocks?)\.{_LAYER}(?P<rest>\..+)?")
# Names that LMs give to the same part of a layer.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_LAST_OF_ATTENTION = ("o_proj", "c_proj", "out_proj", "dense", "wo")
_LAST_OF_MLP = ("act", "act_fn", "activation_fn")
# In an MLP with one of these, the output of the activation function is not yet the input of the last layer.
_GATES = ("gate_proj", "gate_up_proj", "w1")
# Norms of the outputs of attention and MLP, before these are added to the residual stream. In an LM without the second
# norm, the first one runs after the addition.
_NORMED = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}


def no_match(where: str, pattern: str, what: str, base_model: PreTrainedModel, names: list[str]) -> str:
    """The text of the error for a glob that matches none of `names`."""
    return (
        f"{where}: {pattern!r} matches no {what} of {type(base_model).__name__}. "
        f"{near_names(pattern, base_model, names)} Names are those of the base model; '*' stays within one component, "
        "'**' crosses dots."
    )


def near_names(name: str, base_model: PreTrainedModel, names: list[str]) -> str:
    """
    A sentence that helps a user whose name or glob matches nothing.

    Args:
        name (`str`): The name or glob that the user gave.
        base_model (`PreTrainedModel`): The LM without its head.
        names (`list[str]`): The names that are allowed.
    """
    return _lens_hook(name, base_model, names) or _elsewhere(name, base_model, names) or closest(name, names)


def _lens_hook(name: str, base_model: PreTrainedModel, names: list[str]) -> str:
    """A sentence that translates a hook of TransformerLens; empty if the name is none."""
    match = _LENS.fullmatch(name)
    lists = [layers for layers in _layer_lists(base_model) if _matching(f"{layers}.*", names)]
    if match is None or not lists:
        return ""
    number, hook = match["layer"], match["hook"]
    layer = f"{lists[0]}.{number}"
    if not _matching(layer, names):
        count = len(list(base_model.get_submodule(lists[0]).children()))
        return f"That is a hook of TransformerLens in {layer!r}, but this LM has layers 0 to {count - 1}."
    parts = _parts(layer, names)
    if hook == "hook_resid_pre":
        before = int(number) - 1 if number.isdecimal() else 0
        if number.isdecimal() and before >= 0:
            return f"In this LM that hook of TransformerLens is {f'{lists[0]}.{before}'!r}, the layer before."
        return (
            f"In this LM that hook of TransformerLens is the input of {layer!r}, but a hookpoint is the output of "
            "a module."
        )
    exact = {"hook_resid_post": layer} | {f"hook_{part}_out": found[-1] for part, found in parts.items()}
    if (mlp := parts.get("mlp")) and not _child(mlp[0], _GATES, names):
        exact["mlp.hook_post"] = _child(mlp[0], _LAST_OF_MLP, names) or mlp[0]
    if hook in exact:
        return f"In this LM that hook of TransformerLens is {exact[hook]!r}."
    inside = parts.get(hook.split(".")[0], [layer])[0]
    reads = _child(inside, _LAST_OF_ATTENTION, names) if hook == "attn.hook_z" else ""
    what = f"the input of {reads!r}" if reads else "no module's output"
    return f"In this LM that hook of TransformerLens is {what}. The nearest hookpoint is {inside!r}."


def _elsewhere(name: str, base_model: PreTrainedModel, names: list[str]) -> str:
    """A sentence that finds a name, or its end, at the top of the LM, inside a wrapper, or under another name."""
    for inner in (name, *inner_names(name)):
        if inner != name and _matching(inner, names):
            return f"In this LM it is {inner!r}."
        if wrappers := _wrappers(inner, base_model, names):
            return f"In this LM it is {' or '.join(repr(f'{wrapper}.{inner}') for wrapper in wrappers[:3])}."
    if match := _IN_A_LAYER.fullmatch(name):
        for layers in _layer_lists(base_model):
            layer = f"{layers}.{match['layer']}"
            for found in _renamed(layer, match["rest"] or "", names):
                return f"In this LM it is {found!r}."
    return ""


def _renamed(layer: str, rest: str, names: list[str]) -> Iterator[str]:
    """Yields a module of a layer under the names that this LM has for the layer's parts."""
    first, *more = rest.removeprefix(".").split(".")
    for same in (_ATTENTION, _MLP):
        if first in same:
            yield from (name for part in same if _matching(name := ".".join([layer, part, *more]), names))
    if _matching(layer + rest, names):
        yield layer + rest


def _parts(layer: str, names: list[str]) -> dict[str, list[str]]:
    """The attention and MLP of a layer, each followed by the norm of its output if there is one."""
    parts = {"attn": _child(layer, _ATTENTION, names), "mlp": _child(layer, _MLP, names)}
    found = {part: [name] for part, name in parts.items() if name}
    if _child(layer, (_NORMED["mlp"],), names):
        for part in found:
            found[part].append(f"{layer}.{_NORMED[part]}")
    return found


def _child(name: str, choices: tuple[str, ...], names: list[str]) -> str:
    return next((child for choice in choices if _matching(child := f"{name}.{choice}", names)), "")


def _matching(pattern: str, names: list[str]) -> bool:
    return next(match_modules(pattern, names), None) is not None


def _wrappers(pattern: str, base_model: PreTrainedModel, names: list[str]) -> list[str]:
    """Modules inside which a pattern of several components matches; the one with the token embeddings comes first."""
    if "." not in pattern:
        return []
    inside = re.compile(rf"(?P<wrapper>.+?)\.{glob_to_regex(pattern)}")
    found = dict.fromkeys(match["wrapper"] for name in names if (match := inside.fullmatch(name)))
    reads_tokens = {name for name, module in base_model.named_modules() if hasattr(module, "embed_tokens")}
    # A module inside a numbered one is a part of a layer, and no hookpoint's first component names one.
    return sorted((name for name in found if not re.search(r"\.\d", name)), key=lambda name: name not in reads_tokens)


def _layer_lists(base_model: PreTrainedModel) -> list[str]:
    """Names of the lists of an LM's layers; the encoder's comes first."""
    try:
        return [layer_list(base_model)]
    except InputError:
        lists = [name for name, module in base_model.named_modules() if isinstance(module, nn.ModuleList)]
        return [name for name in lists if re.fullmatch(r"(?:encoder|decoder)\.(?:layers?|blocks?)", name)]

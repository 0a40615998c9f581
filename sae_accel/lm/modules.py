import difflib
import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..common.globs import glob_to_regex


def match_modules(pattern: str, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """
    Yields the names that a glob matches, in the order given, each with the text that every wildcard stood for.

    Args:
        pattern (`str`): A glob over dotted names: `*`, `?` and `[012]` stay within one component, `**` crosses dots.
        names (`list[str]`): Dotted names.
    """
    regex = re.compile(glob_to_regex(pattern))
    for name in names:
        if found := regex.fullmatch(name):
            yield name, list(found.groups())


def hookpoint_names(base_model: PreTrainedModel) -> list[str]:
    """
    Dotted names of the modules that a glob can match. Lists of modules are left out, since they have no forward pass.
    Modules that PEFT has put inside its wrapper are left out too: the wrapper has the module's name.
    """
    names: list[str] = []
    passed_over: tuple[str, ...] = ()
    for name, module in base_model.named_modules():
        if passed_over and name.startswith(passed_over):
            continue
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            passed_over = (*passed_over, f"{name}.")
        if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            names.append(name)
    return names


def layer_list(base_model: PreTrainedModel) -> str:
    """
    Name of the list of an LM's layers, such as `layers`, `h` or `encoder.layer`.

    Raises:
        `InputError`: if no list has the LM's number of layers, or several have.
    """
    count = getattr(base_model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        name
        for name, module in base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outermost = [name for name in lists if name.count(".") == min(other.count(".") for other in lists)]
    if len(outermost) != 1:
        found = (
            f"several lists of {count} modules ({', '.join(outermost)})"
            if outermost
            else f"no list of {count} modules"
        )
        raise InputError(
            f"The layers of {type(base_model).__name__} cannot be found: it has {found}. Set --heads.hookpoints."
        )
    return outermost[0]


def closest(name: str, names: list[str]) -> str:
    """A sentence with the names that are spelt most like `name`."""
    closest = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or names[:4]
    return f"Near names: {', '.join(closest)}."

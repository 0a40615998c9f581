"""
Checks on the LM that a recipe names: whether the folder or repo can be an LM, whether its config would run code from
the Hub, and whether its weights fit its config.
"""

import re
from pathlib import Path

from transformers import PreTrainedConfig

from ..common.errors import InputError
from ..common.files import read_json
from ..models.registry import known_config
from ..recipe.arguments import ModelArguments


_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
# Settings that may name a repo on the Hub, whose code transformers then runs. A recipe can replace the first one.
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def check_source(arguments: ModelArguments) -> None:
    """
    Refuses a name that is surely no LM. Whether the Hub has a repo of the name shows only when the repo is read.

    Raises:
        `InputError`: if the name is an address, a file, a missing folder, or a folder without an LM.
    """
    name = arguments.name_or_path
    where, path = f"model.name_or_path: {name!r}", Path(name).expanduser()
    if re.match(r"\w+://|git@", name):
        raise InputError(f"{where} is an address. Name a folder, or a repo on the Hub as in 'user/name'.")
    if path.is_file():
        raise InputError(f"{where} is a file. Name the folder that it lies in, with a config.json.")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(f"{where}: there is no such folder.")
        return
    if (path / _ADAPTER).is_file() and not (path / _CONFIG).is_file():
        lm = read_json(path / _ADAPTER).get("base_model_name_or_path")
        raise InputError(
            f"{where} is a PEFT adapter. Set --model.adapter to it, and --model.name_or_path to the LM that it was "
            f"trained on{f', {lm!r}' if lm else ''}."
        )
    if arguments.gguf_file is None and not (path / _CONFIG).is_file():
        gguf = next((f" Set --model.gguf_file {file.name}." for file in sorted(path.glob("*.gguf"))), "")
        raise InputError(f"{where} has no {_CONFIG}, which every LM's folder has.{gguf}")
    if known_config(read_json(path / _CONFIG).get("model_type")) is not None:
        raise InputError(
            f"{where} is an SAE or transcoder, not an LM. To start heads from it, set --training.init_from."
        )


def check_runs_no_code(config: PreTrainedConfig, arguments: ModelArguments) -> None:
    """
    Refuses a config that would run code from a repo, such as a kernel for attention.

    Raises:
        `InputError`: if the config names a repo that the recipe neither trusts nor replaces.
    """
    if arguments.trust_remote_code:
        return
    settings = _IMPLEMENTATIONS[arguments.attn_implementation is not None :]
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for setting in settings:
            if "/" in str(getattr(part, setting, None) or ""):
                raise InputError(
                    f"model.name_or_path: the config.json of {arguments.name_or_path!r} would run code "
                    f"of {getattr(part, setting)!r} ({setting.lstrip('_')}). Set --model.attn_implementation sdpa "
                    "if the code is for attention, or read the code and set --model.trust_remote_code true."
                )


def check_weights_fit(report: dict, name: str) -> None:
    """
    Refuses weights that differ from the LM's config, since transformers fills them with random numbers.

    Args:
        report (`dict`): The loading info of transformers.
        name (`str`): The LM's folder or repo.

    Raises:
        `InputError`: if a weight has another shape than the config gives it, or a layer's weight is missing.
    """
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"model.name_or_path: {name!r} cannot be loaded: by its config.json {key} should have shape "
            f"{tuple(expected)}, but in its weights it has {tuple(found)}."
        )
    # Weights outside of layers, such as a pooler's, are missing from many files and do not run here.
    if missing := sorted(key for key in report["missing_keys"] if re.search(r"\.\d+\.", key)):
        raise InputError(
            f"model.name_or_path: {name!r} cannot be loaded: its weights lack {missing[0]!r}, one of {len(missing)} "
            "missing weights that its config.json describes."
        )

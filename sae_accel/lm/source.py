"""Whether what a recipe names as its LM can be one, and what of its files must not run."""

import re
from pathlib import Path

from transformers import PreTrainedConfig

from ..common.errors import InputError
from ..common.files import read_json
from ..models.registry import known_config
from ..recipe.arguments import ModelArguments


_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
# Settings that may name a repo on the Hub whose code is then fetched and run, that which a recipe may replace first.
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def check_source(arguments: ModelArguments) -> None:
    """
    Refuses what is surely no LM; whether a repo of that name is on the Hub is found when it is read.

    Raises:
        `InputError`: if it is an address, a file, a folder that is not there, or one of something else.
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
            f"{where} is a PEFT adapter. Name it as model.adapter, and the LM that it was trained on"
            f"{f', {lm!r},' if lm else ''} as model.name_or_path."
        )
    if arguments.gguf_file is None and not (path / _CONFIG).is_file():
        gguf = next((f" Name its {file.name!r} as model.gguf_file." for file in sorted(path.glob("*.gguf"))), "")
        raise InputError(f"{where} has no {_CONFIG}, which every LM's folder has.{gguf}")
    if known_config(read_json(path / _CONFIG).get("model_type")) is not None:
        raise InputError(
            f"{where} is an SAE or transcoder, not an LM. To start heads from it, see training.init_from."
        )


def check_runs_no_code(config: PreTrainedConfig, arguments: ModelArguments) -> None:
    """
    Refuses a config that has code of a repo run, such as a kernel for attention.

    Raises:
        `InputError`: if it names any, and neither is it trusted nor does the recipe name another.
    """
    if arguments.trust_remote_code:
        return
    settings = _IMPLEMENTATIONS[arguments.attn_implementation is not None :]
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for setting in settings:
            if "/" in str(getattr(part, setting, None) or ""):
                raise InputError(
                    f"model.name_or_path: the config.json of {arguments.name_or_path!r} has code of "
                    f"{getattr(part, setting)!r} run ({setting.lstrip('_')}). Set model.attn_implementation if it is "
                    "of attention, to sdpa or eager, or model.trust_remote_code: true once you have read that code."
                )


def check_weights_fit(report: dict, name: str) -> None:
    """
    Holds what transformers tells of weights that it has read to what the config asks for.

    Args:
        report (`dict`): Its loading info.
        name (`str`): The LM.

    Raises:
        `InputError`: if a weight has another shape, or a layer's is missing: both would be random.
    """
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"model.name_or_path: {name!r} cannot be loaded: by its config.json {key} should have shape "
            f"{tuple(expected)}, but in its weights it has {tuple(found)}."
        )
    # What lies in no layer, such as a pooler, is missing from many files and not run here.
    if missing := sorted(key for key in report["missing_keys"] if re.search(r"\.\d+\.", key)):
        raise InputError(
            f"model.name_or_path: {name!r} cannot be loaded: its weights lack {missing[0]!r}, and {len(missing)} in "
            "all, which by its config.json it has."
        )

"""
The kinds of heads: a table from a file's `model_type`, or a recipe's `type`, to a config class and a model class.

A package of your own can add a kind with one call of `register`; recipes, `AutoSae` and transformers' Auto classes
know it from then on.
"""

from transformers import AutoConfig, AutoModel

from ..common.errors import InputError, near
from ..recipe.arguments import KINDS
from .configuration_head import HeadConfig
from .configuration_sae import SaeConfig
from .configuration_transcoder import TranscoderConfig
from .modeling_head import HeadModel
from .modeling_sae import SaeModel
from .modeling_transcoder import TranscoderModel


_BY_MODEL_TYPE: dict[str, tuple[type[HeadConfig], type[HeadModel]]] = {}


def register(config_class: type[HeadConfig], model_class: type[HeadModel]) -> None:
    """
    Adds a kind of head to recipes, to `AutoSae` and to transformers' Auto classes.

    Args:
        config_class (`type[HeadConfig]`): The config. It names the kind (`kind`, `model_type`), where it reads and
            what it predicts.
        model_class (`type[HeadModel]`): The model. Its annotation `config` must be `config_class`.

    Examples:
        ```python { no-run }
        from sae_accel import HeadArguments
        from sae_accel.models import register

        register(CrosscoderConfig, CrosscoderModel)
        HeadArguments(hookpoints="layers.*", type="crosscoder")
        ```
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    _BY_MODEL_TYPE[config_class.model_type] = config_class, model_class
    KINDS.setdefault(config_class.kind, {})


def known_config(model_type: object) -> type[HeadConfig] | None:
    """
    The config class of a file's `model_type`; None if the file is not that of a head.

    Args:
        model_type (`object`): The value in the file's `config.json`.
    """
    return _BY_MODEL_TYPE[model_type][0] if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE else None


def config_of_kind(kind: str) -> type[HeadConfig]:
    """
    The config class of a kind that a recipe names.

    Args:
        kind (`str`): The value of `heads.type`.

    Raises:
        `InputError`: if no kind has this name.
    """
    configs = {config.kind: config for config, _ in _BY_MODEL_TYPE.values()}
    if kind not in configs:
        raise InputError(f"heads.type: found {kind!r}.{near(kind, configs)} Allowed are {', '.join(configs)}.")
    return configs[kind]


def model_of(config: HeadConfig) -> type[HeadModel]:
    """The model class of a config."""
    return _BY_MODEL_TYPE[config.model_type][1]


register(SaeConfig, SaeModel)
register(TranscoderConfig, TranscoderModel)

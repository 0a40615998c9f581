"""Kinds of heads: the configuration and the model of each, by the `model_type` of its files and by a recipe's word."""

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
    Makes a kind of head known to recipes, to `AutoSae` and to transformers' Auto classes.

    Args:
        config_class (`type[HeadConfig]`): Says what the kind is called (`kind`, `model_type`), where it reads and what
            it predicts.
        model_class (`type[HeadModel]`): Computes. Its annotation `config` must be that class.

    Examples:
        ```python
        register(CrosscoderConfig, CrosscoderModel)
        HeadArguments(hookpoints="layers.*", type="crosscoder")
        ```
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    _BY_MODEL_TYPE[config_class.model_type] = config_class, model_class
    KINDS.setdefault(config_class.kind, {})


def known_config(model_type: object) -> type[HeadConfig] | None:
    """The configuration whose files have this `model_type`, if they are those of a head."""
    return _BY_MODEL_TYPE[model_type][0] if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE else None


def config_of_kind(kind: str) -> type[HeadConfig]:
    """
    The configuration of a kind that a recipe may name.

    Raises:
        `InputError`: if there is no such kind.
    """
    configs = {config.kind: config for config, _ in _BY_MODEL_TYPE.values()}
    if kind not in configs:
        raise InputError(
            f"heads.type: {kind!r} is no kind of head.{near(kind, configs)} Allowed: {', '.join(configs)}."
        )
    return configs[kind]


def model_of(config: HeadConfig) -> type[HeadModel]:
    """The model that a configuration is of."""
    return _BY_MODEL_TYPE[config.model_type][1]


register(SaeConfig, SaeModel)
register(TranscoderConfig, TranscoderModel)

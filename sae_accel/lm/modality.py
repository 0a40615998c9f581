from typing import cast

from transformers import PreTrainedModel

from ..common.errors import InputError
from .hooks import base_of, token_model


# The kind of data that a model reads, by the name of its main input.
_READS = {
    "pixel_values_videos": "videos",
    "input_features": "audio",
    "input_values": "audio",
}


def check_reads_text(model: PreTrainedModel, name: str) -> None:
    """
    Refuses a model that cannot read a recipe's texts.

    Args:
        model (`PreTrainedModel`): The model, which may lie on the meta device.
        name (`str`): Its folder or repo.

    Raises:
        `InputError`: if the model reads images or audio, or does not read tokens alone.
    """
    base_model = base_of(model)
    kind = f"model.name_or_path: {name!r} is a {model.config.model_type} model"
    main_input = cast(PreTrainedModel, token_model(base_model)).main_input_name
    if main_input == "pixel_values":
        raise InputError(
            f"{kind}, which reads images, but a recipe trains on text. From Python, SaeTrainer trains on it, with "
            "rows that have `pixel_values`."
        )
    if main_input in _READS:
        raise InputError(f"{kind}, which reads {_READS[main_input]}, but a recipe trains on text. Use an LM.")
    try:
        base_model.get_input_embeddings()
    except NotImplementedError as error:
        raise InputError(
            f"{kind}, which does not read tokens alone, but a recipe trains on text. Use an LM, or the part of "
            "this model that reads text."
        ) from error

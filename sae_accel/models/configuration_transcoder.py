from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from typing_extensions import Self

from ..recipe.arguments import HeadArguments
from .configuration_head import HeadConfig


@strict
class TranscoderConfig(HeadConfig):
    """
    Configuration of a [`TranscoderModel`], which reads one activation and predicts another. See [`HeadConfig`] for the
    other fields.

    Args:
        d_out (`int`, *optional*): Width of what is predicted; `d_in` if not given.
        skip_connection (`bool`, defaults to `False`): Add a linear map `W_skip` of the input to the output.
    """

    model_type = "sae_accel_transcoder"
    kind = "transcoder"
    reads_input = True
    tag = "transcoder"
    paper = ("Transcoders", "Dunefsky et al. 2024", "2406.11944")

    normalize_decoder: bool = False
    apply_b_dec_to_input: bool = False
    if TYPE_CHECKING:
        # None until `__post_init__` alone.
        d_out: int
    else:
        d_out: int | None = None
    skip_connection: bool = False

    @classmethod
    def from_entry(cls, entry: HeadArguments, **fields: Any) -> Self:
        """As of any head, with the entry's skip connection."""
        return super().from_entry(entry, skip_connection=entry.skip_connection, **fields)

    @property
    def title(self) -> str:
        """What a card's table calls it."""
        return "skip transcoder" if self.skip_connection else "transcoder"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.d_out is None:
            self.d_out = self.d_in
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checks that the sizes agree; called at construction and when the config is saved."""
        super().validate_architecture()
        if self.apply_b_dec_to_input and self.d_out != self.d_in:
            raise ValueError(f"b_dec has width d_out, {self.d_out}, and cannot be taken from an input of {self.d_in}.")

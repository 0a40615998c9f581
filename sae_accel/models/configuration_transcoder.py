from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from typing_extensions import Self

from ..recipe.arguments import HeadArguments
from .configuration_head import HeadConfig


@strict
class TranscoderConfig(HeadConfig):
    """
    Config of a [`TranscoderModel`], which reads one activation and predicts another.

    Args:
        d_out (`int`, *optional*): Width of the activation that the head predicts; `d_in` if not given.
        skip_connection (`bool`, defaults to `False`): Add a linear map `W_skip` of the input to the output.
        kwargs (*optional*): The fields of [`HeadConfig`], such as `d_in`, `num_latents` and `k`.

    Raises:
        `ValueError`: if the sizes disagree, for example if k is larger than `num_latents`.

    Examples:
        ```python
        from sae_accel import TranscoderConfig, TranscoderModel

        config = TranscoderConfig(d_in=576, d_out=576, num_latents=4608, k=32, skip_connection=True)
        transcoder = TranscoderModel(config)
        ```
    """

    model_type = "sae_accel_transcoder"
    kind = "transcoder"
    reads_input = True
    tag = "transcoder"
    paper = ("Transcoders", "Dunefsky et al. 2024", "2406.11944")

    normalize_decoder: bool = False
    apply_b_dec_to_input: bool = False
    if TYPE_CHECKING:
        # None only until `__post_init__`.
        d_out: int
    else:
        d_out: int | None = None
    skip_connection: bool = False

    @classmethod
    def from_entry(cls, entry: HeadArguments, **fields: Any) -> Self:
        """
        The config of a transcoder that an entry of a recipe describes, with the entry's skip connection.

        Args:
            entry ([`HeadArguments`]): The entry.
            fields (*optional*): Fields that the LM determines: `d_in`, `d_out`, `num_latents`, `hookpoint`, `source`.

        Examples:
            ```python
            from sae_accel import HeadArguments, TranscoderConfig

            entry = HeadArguments(hookpoints="layers.3.mlp", type="transcoder", skip_connection=True, k=8)
            TranscoderConfig.from_entry(entry, d_in=24, d_out=24, hookpoint="layers.3.mlp")
            ```
        """
        return super().from_entry(entry, skip_connection=entry.skip_connection, **fields)

    @property
    def title(self) -> str:
        """The name of this kind of head in a model card's table."""
        return "skip transcoder" if self.skip_connection else "transcoder"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.d_out is None:
            self.d_out = self.d_in
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """
        Checks that the fields agree. It runs when the config is made and when it is saved.

        Raises:
            `ValueError`: if a field is not allowed, or two fields disagree.

        Examples:
            ```python
            from sae_accel import TranscoderConfig

            config = TranscoderConfig(d_in=24, num_latents=96, k=8)
            config.k = 16
            config.validate_architecture()
            ```
        """
        super().validate_architecture()
        if self.apply_b_dec_to_input and self.d_out != self.d_in:
            raise ValueError(
                f"apply_b_dec_to_input is True, but b_dec has width d_out = {self.d_out} and the input has width "
                f"d_in = {self.d_in}. Set apply_b_dec_to_input=False."
            )

from typing import Any

from huggingface_hub.dataclasses import strict
from typing_extensions import Self

from ..recipe.arguments import HeadArguments
from .configuration_head import HeadConfig


@strict
class SaeConfig(HeadConfig):
    """
    Config of an [`SaeModel`], which reads the activation of one hookpoint and reconstructs it.

    Args:
        d_in (`int`): Width of the activations that the head reads.
        num_latents (`int`, *optional*): Number of latents; `expansion_factor * d_in` if not given.
        expansion_factor (`int`, *optional*, defaults to 32): Latents per dimension of the input, read only if
            `num_latents` is not given.
        k (`int`, *optional*, defaults to 32): Active latents per token.
        kwargs (*optional*): The other fields of [`HeadConfig`].

    Raises:
        `ValueError`: if the sizes disagree, for example if k is larger than `num_latents`.

    Examples:
        ```python
        from sae_accel import SaeConfig, SaeModel

        config = SaeConfig(d_in=576, expansion_factor=8, k=32)
        sae = SaeModel(config)
        ```
    """

    model_type = "sae_accel_sae"
    kind = "sae"
    title = "SAE"
    long_titles = ("sparse autoencoder (SAE)", "sparse autoencoders (SAEs)")
    tag = "sparse-autoencoder"

    @classmethod
    def from_entry(cls, entry: HeadArguments, **fields: Any) -> Self:
        """
        The config of an SAE that an entry of a recipe describes. Its decoder rows stay at norm 1 unless the entry sets
        `normalize_decoder` to false.

        Args:
            entry ([`HeadArguments`]): The entry.
            fields (*optional*): Fields that the LM determines: `d_in`, `num_latents`, `hookpoint`.

        Examples:
            ```python
            from sae_accel import HeadArguments, SaeConfig

            entry = HeadArguments(hookpoints="layers.1", k=8)
            SaeConfig.from_entry(entry, d_in=24, hookpoint="layers.1")
            ```
        """
        fields.pop("d_out", None)
        return super().from_entry(entry, normalize_decoder=entry.normalize_decoder is not False, **fields)

    @property
    def d_out(self) -> int:
        """Width of the reconstruction: `d_in`."""
        return self.d_in

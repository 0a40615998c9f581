from typing import Any

from huggingface_hub.dataclasses import strict
from typing_extensions import Self

from ..recipe.arguments import HeadArguments
from .configuration_head import HeadConfig


@strict
class SaeConfig(HeadConfig):
    """
    Configuration of an [`SaeModel`], which reads and rebuilds one hookpoint. See [`HeadConfig`] for its fields.

    Examples:
        ```python
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
        """As of any head; its rows are kept at unit norm unless the entry says otherwise."""
        fields.pop("d_out", None)
        return super().from_entry(entry, normalize_decoder=entry.normalize_decoder is not False, **fields)

    @property
    def d_out(self) -> int:
        """Width of what the head produces."""
        return self.d_in

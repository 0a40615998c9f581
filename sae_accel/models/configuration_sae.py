from huggingface_hub.dataclasses import strict

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

    @property
    def d_out(self) -> int:
        """Width of what the head produces."""
        return self.d_in

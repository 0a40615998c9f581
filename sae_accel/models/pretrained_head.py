"""
The parameters of a head: how they start, and how they are loaded, saved and released.

A head is a `PreTrainedModel`, so `from_pretrained`, `save_pretrained` and `push_to_hub` work as in transformers. On
top of this, files with NaN or infinite numbers are never written, and a head can drop all latents but one slice, for
training on several processes.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.loading_report import LoadStateDictInfo
from typing_extensions import Self

from ..common.errors import InputError
from ..common.quiet import quiet_files
from ..ops.finite import first_non_finite
from .configuration_head import HeadConfig
from .latent_selection import SELECTIONS, LatentSelection
from .latent_slice import LatentSlice
from .releasing import push_saved


# Parameters with one row per latent.
BY_LATENT = ("encoder.weight", "encoder.bias", "W_dec", "threshold", "b_mag", "r_mag")


class PreTrainedHead(PreTrainedModel):
    """
    The parameters of a head and their files.

    As in transformers, the `__init__` of each concrete class ends with `self.post_init()`, after it has added its own
    parameters.
    """

    config: HeadConfig
    # Some activations have these, with one number per latent.
    threshold: Tensor
    b_mag: Tensor
    r_mag: Tensor
    base_model_prefix = "head"
    main_input_name = "activations"
    # Tensors that a head without a decoder does not read from its file.
    _keys_to_ignore_on_load_unexpected = [r"^W_dec$", r"^W_skip$"]

    def __init__(self, config: HeadConfig):
        super().__init__(config)
        self.encoder = nn.Linear(config.d_in, config.num_latents)
        self.b_dec = nn.Parameter(torch.empty(config.d_out))
        has_skip = config.skip_connection and not config.encoder_only
        self.W_dec = None if config.encoder_only else nn.Parameter(torch.empty(config.num_latents, config.d_out))
        self.W_skip = nn.Parameter(torch.empty(config.d_out, config.d_in)) if has_skip else None
        for name in self._selection.parameters:
            self.register_parameter(name, nn.Parameter(torch.empty(config.num_latents)))
        for name in self._selection.buffers:
            self.register_buffer(name, torch.empty(config.num_latents))
        self.latent_slice: LatentSlice | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, hookpoint: str | None = None, **kwargs: Any
    ) -> Self:
        """
        Loads a head from a folder or a Hub repo, like `from_pretrained` in transformers, with two more arguments.

        Args:
            pretrained_model_name_or_path (`str`): A folder or a Hub repo.
            hookpoint (`str`, *optional*): The head to load, if the folder or repo holds several; an alias of
                `subfolder`.
            encoder_only (`bool`, defaults to `False`): Whether to skip the decoder, so that the head can encode but
                not reconstruct.
            kwargs (*optional*): Other arguments of `from_pretrained` in transformers, such as `dtype` and `revision`.

        Raises:
            `OSError`: if the folder, the repo or the head does not exist.

        Examples:
            ```python
            from sae_accel import SaeModel, TranscoderModel

            sae = SaeModel.from_pretrained("runs/quickstart", hookpoint="layers.1")
            encoder = TranscoderModel.from_pretrained("runs/quickstart", hookpoint="layers.3.mlp", encoder_only=True)
            ```
        """
        if hookpoint is not None:
            kwargs["subfolder"] = hookpoint
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> LoadStateDictInfo:
        """
        Loads nothing. Transformers would put an adapter that lies beside a head onto the head, but it belongs to the
        LM.

        Examples:
            ```python
            sae.load_adapter("runs/quickstart")  # changes nothing
            ```
        """
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """
        Saves the head in a folder, like `save_pretrained` in transformers, after a check that its numbers are finite.

        Args:
            save_directory (`str`): The folder, which is created if it is missing.
            kwargs (*optional*): Other arguments of `save_pretrained` in transformers.

        Raises:
            `InputError`: if a number of the head is NaN or infinite; nothing is written then.

        Examples:
            ```python
            from sae_accel import SaeModel

            sae.save_pretrained("my-sae")
            SaeModel.from_pretrained("my-sae")
            ```
        """
        weights = kwargs.get("state_dict")
        if words := first_non_finite((self.state_dict() if weights is None else weights).items()):
            name = self.config.hookpoint or self.config.name_or_path
            raise InputError(f"Head {name!r} cannot be saved: {words}. Use weights from before they became so.")
        super().save_pretrained(save_directory, *args, **kwargs)

    # Transformers' method pushes only the files; this one makes one commit with a card.
    def push_to_hub(self, repo_id: str, license: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Releases the head at the top level of a Hub repo, in one commit, with a model card.

        Args:
            repo_id (`str`): The repo: `name` or `user/name`.
            license (`str`, *optional*): The Hub's identifier of a license, for the card.
            kwargs (*optional*): `private`, `revision`, `token` and `message`, as in [`Release.push`].

        Returns:
            [`Pushed`].

        Raises:
            `InputError`: if a number of the head is NaN or infinite, or if the Hub refuses or cannot be reached.

        Examples:
            ```python { no-run }
            sae.push_to_hub("user/sae-smollm2-135m-layers.1", license="mit")
            ```
        """

        def save(folder: str) -> None:
            with quiet_files():
                self.save_pretrained(folder)

        return push_saved(save, repo_id, license, **kwargs)

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """
        Whether `save_pretrained` writes files on this process. It does on every process that calls it, because each
        process may hold its own heads.

        Args:
            is_main_process (`bool`): The argument `is_main_process` of `save_pretrained`.

        Examples:
            ```python
            sae.should_save_on_this_rank(True)  # True
            ```
        """
        return is_main_process

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Zeros for two tokens, `(2, d_in)`."""
        return {"activations": torch.zeros(2, self.config.d_in, dtype=self.dtype, device=self.device)}

    @property
    def num_latents(self) -> int:
        """Number of latents that this process holds: all of the config's, unless latents are spread over processes."""
        return self.encoder.out_features

    def keep_latents(self, latent_slice: LatentSlice) -> None:
        """
        Drops all latents except one slice. Every process must then call `forward` together, with the same tokens.

        The reconstruction still comes from all latents. Indices in the output count from the slice's start.

        Args:
            latent_slice ([`LatentSlice`]): The latents to keep.

        Examples:
            ```python
            from sae_accel.models import LatentSlice

            half = sae.num_latents // 2
            sae.keep_latents(LatentSlice([0, half, 2 * half], index=0))  # on the first of two processes
            sae.num_latents
            ```
        """
        for name, parameter in list(self.named_parameters()):
            if name in BY_LATENT:
                module, _, key = name.rpartition(".")
                own = nn.Parameter(latent_slice.of(parameter.detach()).clone(), parameter.requires_grad)
                setattr(self.get_submodule(module), key, own)
        self.encoder.out_features = len(self.encoder.weight)
        self.latent_slice = latent_slice

    def own_rows(self, rows: Tensor) -> Tensor:
        """
        The rows of the latents that this process holds.

        Args:
            rows (`torch.Tensor` of shape `(config.num_latents, ...)`): Rows of all latents of the head.

        Examples:
            ```python
            sae.own_rows(torch.zeros(sae.config.num_latents)).shape  # all rows, unless latents are spread
            ```
        """
        return rows if self.latent_slice is None else self.latent_slice.of(rows)

    @torch.no_grad()
    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        """
        Copies the parameters of a whole head into this one.

        Args:
            weights (`Mapping[str, torch.Tensor]`): The state dict of a whole head.

        Examples:
            ```python
            from sae_accel import SaeModel

            copy = SaeModel(sae.config)
            copy.load_whole(sae.state_dict())
            ```
        """
        for name, tensor in self.state_dict(keep_vars=True).items():
            tensor.copy_(self.own_rows(weights[name]) if name in BY_LATENT else weights[name])

    def __repr__(self) -> str:
        """Kind, hookpoint, activation, k, and widths of encoder and decoder, in one line."""
        config = self.config
        place = f" at {config.hookpoint}" if config.hookpoint else ""
        decoder = "no decoder" if self.W_dec is None else f"decoder {config.num_latents:,} -> {config.d_out:,}"
        k = "" if config.k is None else f", k={config.k}"
        return (
            f"{type(self).__name__}({config.title}{place}, {config.activation}{k}, "
            f"encoder {config.d_in:,} -> {config.num_latents:,}, {decoder}, {self.dtype})"
        )

    @property
    def decoder_rows(self) -> Tensor:
        """
        The decoder `W_dec`, `(num_latents, d_out)`.

        Raises:
            `ValueError`: if the head was loaded without its decoder.
        """
        if self.W_dec is None:
            raise ValueError(
                "The head has no decoder, because it was loaded with encoder_only=True. To decode, load it with "
                "encoder_only=False."
            )
        return self.W_dec

    @property
    def _selection(self) -> LatentSelection:
        return SELECTIONS[self.config.activation]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, PreTrainedHead):
            return
        init.kaiming_uniform_(module.encoder.weight, a=math.sqrt(5))
        init.zeros_(module.encoder.bias)
        init.zeros_(module.b_dec)
        for name in (*module._selection.parameters, *module._selection.buffers):
            init.zeros_(getattr(module, name))
        if module.W_skip is not None:
            init.zeros_(module.W_skip)
        if module.W_dec is not None:
            init.copy_(module.W_dec, module._initial_decoder())

    def _initial_decoder(self) -> Tensor:
        """The initial `W_dec`, `(num_latents, d_out)`."""
        # With zeros, an untrained transcoder predicts the target's mean instead of noise.
        return torch.zeros_like(self.decoder_rows)

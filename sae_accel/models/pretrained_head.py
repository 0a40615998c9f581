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


# Parameters with a row for each latent.
BY_LATENT = ("encoder.weight", "encoder.bias", "W_dec", "threshold", "b_mag", "r_mag")


class PreTrainedHead(PreTrainedModel):
    """
    The parameters of a head: where they start, how they are loaded, saved and released, and which are here.

    As in transformers, the `__init__` of a class that is made ends with `self.post_init()`, after it has added
    parameters of its own.
    """

    config: HeadConfig
    # Numbers by latent that some activations have.
    threshold: Tensor
    b_mag: Tensor
    r_mag: Tensor
    base_model_prefix = "head"
    main_input_name = "activations"
    # The tensors that a head without a decoder leaves in its file.
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
        As in transformers, with two arguments more.

        Args:
            hookpoint (`str`, *optional*): Head to take from a folder or repo of several; an alias of `subfolder`.
            encoder_only (`bool`, defaults to `False`): Read no decoder; the head can encode but not reconstruct.

        Raises:
            `OSError`: if there is no such folder, repo or head.
        """
        if hookpoint is not None:
            kwargs["subfolder"] = hookpoint
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> LoadStateDictInfo:
        """Loads nothing: an adapter beside a head, which transformers would put onto it, is an LM's."""
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """
        As in transformers.

        Raises:
            `InputError`: if a number of the head is NaN or infinite; nothing is written then.
        """
        weights = kwargs.get("state_dict")
        if words := first_non_finite((self.state_dict() if weights is None else weights).items()):
            name = self.config.hookpoint or self.config.name_or_path
            raise InputError(f"Head {name!r} cannot be saved: {words}. Go back to weights from before they arose.")
        super().save_pretrained(save_directory, *args, **kwargs)

    # One commit with a card, where transformers' method pushes the files of one model.
    def push_to_hub(self, repo_id: str, license: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Releases the head to the top of a repo, in one commit, with a model card.

        Args:
            repo_id (`str`): Where to: `name` or `user/name`.
            license (`str`, *optional*): The Hub's identifier of a license, for the card.
            kwargs (*optional*): `private`, `revision`, `token` and `message`, as of [`Release.push`].

        Returns:
            [`Pushed`].

        Raises:
            `InputError`: if the head has a number that is NaN or infinite, or the Hub refuses or cannot be reached.
        """

        def save(folder: str) -> None:
            with quiet_files():
                self.save_pretrained(folder)

        return push_saved(save, repo_id, license, **kwargs)

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """Whether `save_pretrained` writes files: wherever it is called, as each process may hold its own heads."""
        return is_main_process

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Two tokens' worth of zeros, `(2, d_in)`."""
        return {"activations": torch.zeros(2, self.config.d_in, dtype=self.dtype, device=self.device)}

    @property
    def num_latents(self) -> int:
        """Latents that are here: those of the config, but for a head whose latents lie on several processes."""
        return self.encoder.out_features

    def keep_latents(self, latent_slice: LatentSlice) -> None:
        """
        Lets go of all latents but those of a slice. From then on `forward` needs every process, takes the same tokens
        on each, and gives the reconstruction by all latents, with indices that count from the slice's start.
        """
        for name, parameter in list(self.named_parameters()):
            if name in BY_LATENT:
                module, _, key = name.rpartition(".")
                own = nn.Parameter(latent_slice.of(parameter.detach()).clone(), parameter.requires_grad)
                setattr(self.get_submodule(module), key, own)
        self.encoder.out_features = len(self.encoder.weight)
        self.latent_slice = latent_slice

    def own_rows(self, rows: Tensor) -> Tensor:
        """Of rows for all latents of the head, those for the latents that are here."""
        return rows if self.latent_slice is None else self.latent_slice.of(rows)

    @torch.no_grad()
    def load_whole(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over the parameters of a whole head, by name."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            tensor.copy_(self.own_rows(weights[name]) if name in BY_LATENT else weights[name])

    def __repr__(self) -> str:
        """Kind, hookpoint, k, activation and widths of encoder and decoder, in one line."""
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
        `W_dec`, `(num_latents, d_out)`.

        Raises:
            `ValueError`: if the head was loaded without its decoder.
        """
        if self.W_dec is None:
            raise ValueError("The head was loaded with encoder_only=True and cannot decode. Load it without.")
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
        """Where `W_dec` starts, `(num_latents, d_out)`."""
        # Before training, a transcoder should predict the target's mean, not noise.
        return torch.zeros_like(self.decoder_rows)

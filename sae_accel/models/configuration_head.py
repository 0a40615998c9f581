"""
The config that every kind of head shares: widths, number of latents, activation, and where the head was trained.

A config also answers what the rest of the package needs to know of a kind of head: where it reads, what it predicts,
and how cards name it. So no other code asks whether a head is an SAE or a transcoder.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from typing_extensions import Self

from ..recipe.arguments import HeadArguments
from .latent_selection import SELECTIONS


# The name of a module of an LM's base model, and the side of it: its input or its output.
ModuleSide = tuple[str, Literal["input", "output"]]


@strict
class HeadConfig(PreTrainedConfig):
    """
    Base class of [`SaeConfig`] and [`TranscoderConfig`]: the fields that SAEs and transcoders share.

    Args:
        d_in (`int`): Width of the activations that the head reads.
        num_latents (`int`, *optional*): Number of latents; `expansion_factor * d_in` if not given.
        expansion_factor (`int`, *optional*, defaults to 32): Latents per dimension of the input. It is read only if
            `num_latents` is not given, and becomes None if `num_latents` is not a multiple of `d_in`.
        k (`int`, *optional*, defaults to 32): Active latents per token. For activations that select by a threshold, k
            is the number on average, and may be None if it is not known.
        activation (`str`, defaults to `"topk"`): The rule that selects latents. For training: `"topk"` (the k largest
            per token), `"groupmax"` (the largest of each of k groups), `"batchtopk"` (the largest of a batch in
            training, all above one threshold after it) and `"jumprelu"` (all above the latent's own learnt threshold).
            Only for heads that other libraries trained: `"relu"`, `"gated"` and `"signed_topk"` (the k largest by
            magnitude, with their sign).
        bandwidth (`float`, defaults to 0.1): With `jumprelu`: width of the kernel that gives thresholds a gradient, as
            a fraction of the threshold.
        normalize_input (`str`, *optional*): How each activation is normalised before it is encoded: `"layer_norm"`
            gives it mean 0 and standard deviation 1, `"constant_norm"` the norm `sqrt(d_in)`. The reconstruction is
            scaled back. No normalisation if not given.
        normalize_decoder (`bool`): Whether training keeps the decoder's rows at norm 1.
        apply_b_dec_to_input (`bool`): Whether `b_dec` is subtracted from the input before it is encoded.
        encoder_only (`bool`, defaults to `False`): Whether the head has no decoder, so that it can encode but not
            reconstruct.
        hookpoint (`str`, *optional*): Module of the LM's base model at which the head was trained.
        source (`str`, *optional*): Module whose output the head reads; the hookpoint's own input or output if not
            given.
        aliases (`list[str]`, *optional*): Names of the hookpoint in other libraries, such as
            `blocks.10.hook_resid_post`.
        base_model_name_or_path (`str`, *optional*): The LM on which the head was trained.
        base_model_revision (`str`, *optional*): The commit of this LM.

    Raises:
        `ValueError`: if the sizes disagree, for example if k is larger than `num_latents`.
    """

    # `kind` is the name in recipes and tables. `reads_input` holds for heads without a source.
    kind: ClassVar[str]
    reads_input: ClassVar[bool] = False
    # The tag of a model card, and the paper that it credits: method, authors and year, arXiv id.
    tag: ClassVar[str]
    paper: ClassVar[tuple[str, str, str] | None] = None
    # A head without a width means nothing, so no default config exists to compare a saved one with.
    has_no_defaults_at_init: ClassVar[bool] = True

    d_in: int = 0
    if TYPE_CHECKING:
        # None only until `__post_init__`.
        num_latents: int

        @property
        def d_out(self) -> int: ...

        @property
        def skip_connection(self) -> bool: ...

    else:
        skip_connection: ClassVar[bool] = False
        num_latents: int | None = None
    expansion_factor: int | None = 32
    k: int | None = 32
    activation: str = "topk"
    bandwidth: float = 0.1
    normalize_input: str | None = None
    normalize_decoder: bool = True
    apply_b_dec_to_input: bool = True
    encoder_only: bool = False
    hookpoint: str | None = None
    source: str | None = None
    aliases: list[str] | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_latents is None:
            self.num_latents = (self.expansion_factor or 0) * self.d_in
        self.expansion_factor, rest = divmod(self.num_latents, self.d_in or 1)
        if rest:
            self.expansion_factor = None
        super().__post_init__(**kwargs)

    @classmethod
    def reads_at(cls, hookpoint: str, source: str | None = None) -> tuple[ModuleSide, ...]:
        """
        The modules whose input or output a head of this kind reads. Several inputs are joined along the last
        dimension.

        Args:
            hookpoint (`str`): Module of the LM's base model at which the head sits.
            source (`str`, *optional*): Module whose output the head reads instead.

        Returns:
            `tuple[tuple[str, str], ...]`: pairs of a module and `"input"` or `"output"`.

        Examples:
            ```python
            from sae_accel import SaeConfig, TranscoderConfig

            SaeConfig.reads_at("layers.3.mlp")  # (("layers.3.mlp", "output"),)
            TranscoderConfig.reads_at("layers.3.mlp")  # (("layers.3.mlp", "input"),)
            ```
        """
        if source is not None:
            return ((source, "output"),)
        return ((hookpoint, "input" if cls.reads_input else "output"),)

    @classmethod
    def predicts_at(cls, hookpoint: str) -> tuple[ModuleSide, ...]:
        """
        The modules whose output a head of this kind reproduces. Several targets are joined along the last dimension.

        Args:
            hookpoint (`str`): Module of the LM's base model at which the head sits.

        Returns:
            `tuple[tuple[str, str], ...]`: pairs of a module and `"input"` or `"output"`.

        Examples:
            ```python
            from sae_accel import TranscoderConfig

            TranscoderConfig.predicts_at("layers.3.mlp")  # (("layers.3.mlp", "output"),)
            ```
        """
        return ((hookpoint, "output"),)

    @classmethod
    def from_entry(cls, entry: HeadArguments, **fields: Any) -> Self:
        """
        The config of a head that an entry of a recipe describes.

        Args:
            entry ([`HeadArguments`]): The entry.
            fields (*optional*): Fields that the LM determines: `d_in`, `d_out`, `num_latents`, `hookpoint`, `source`.

        Examples:
            ```python
            from sae_accel import HeadArguments, TranscoderConfig

            entry = HeadArguments(hookpoints="layers.3.mlp", type="transcoder", k=8)
            TranscoderConfig.from_entry(entry, d_in=24, d_out=24, hookpoint="layers.3.mlp")
            ```
        """
        return cls(expansion_factor=entry.expansion_factor, k=entry.k, activation=entry.activation, **fields)

    @property
    def trained_k(self) -> int:
        """
        `k`, which training needs.

        Raises:
            `ValueError`: if k is None.
        """
        if self.k is None:
            raise ValueError("k is None: the head's files do not hold it, but training needs it. Set head.config.k.")
        return self.k

    @property
    def title(self) -> str:
        """The name of this kind of head in a model card's table."""
        return self.kind

    @property
    def long_titles(self) -> tuple[str, str]:
        """The name of this kind of head in the text of a model card, in the singular and the plural."""
        return self.title, f"{self.title}s"

    @property
    def widths(self) -> str:
        """The widths as text, for example `576 -> 4,608 -> 576`: `d_in`, `num_latents`, `d_out`."""
        return f"{self.d_in:,} -> {self.num_latents:,} -> {self.d_out:,}"

    @property
    def num_parameters(self) -> int:
        """Number of weights of the head, without thresholds and gates, which have one number per latent."""
        skip = self.d_in * self.d_out if self.skip_connection else 0
        return self.num_latents * (self.d_in + self.d_out + 1) + self.d_out + skip

    def validate_architecture(self) -> None:
        """
        Checks that the fields agree. It runs when the config is made and when it is saved.

        Raises:
            `ValueError`: if a field is not allowed, or two fields disagree.

        Examples:
            ```python
            from sae_accel import SaeConfig

            config = SaeConfig(d_in=24, num_latents=96, k=8)
            config.k = 16
            config.validate_architecture()
            ```
        """
        if self.d_in < 1:
            raise ValueError(f"d_in is {self.d_in}, but it must be the width of the head's input, a positive number.")
        if self.activation not in SELECTIONS:
            raise ValueError(f"activation is {self.activation!r}; allowed are {', '.join(SELECTIONS)}.")
        if self.normalize_input not in (None, "layer_norm", "constant_norm"):
            raise ValueError(
                f"normalize_input is {self.normalize_input!r}; allowed are layer_norm, constant_norm and None."
            )
        if self.k is None and SELECTIONS[self.activation].counts:
            raise ValueError(f"k is None, but {self.activation} selects k latents per token. Give k, such as k=32.")
        if self.k is not None and not 1 <= self.k <= self.num_latents:
            raise ValueError(f"k is {self.k}, but it must be from 1 to num_latents, {self.num_latents}.")
        if self.activation == "groupmax" and self.num_latents % self.trained_k:
            raise ValueError(
                f"groupmax cuts the latents into k equal groups, but num_latents = {self.num_latents} is not a "
                f"multiple of k = {self.k}. Change k or num_latents."
            )

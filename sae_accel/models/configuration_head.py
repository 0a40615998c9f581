from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from typing_extensions import Self

from ..recipe.arguments import HeadArguments
from .latent_selection import SELECTIONS


# A module of an LM's base model, and `"input"` or `"output"` of it.
ModuleSide = tuple[str, Literal["input", "output"]]


@strict
class HeadConfig(PreTrainedConfig):
    """
    What SAEs and transcoders have in common.

    Args:
        d_in (`int`): Width of what the head reads.
        num_latents (`int`, *optional*): Latents; `expansion_factor * d_in` if not given.
        expansion_factor (`int`, *optional*, defaults to 32): Latents for each dimension of the input. Read only if
            `num_latents` is not given, and None if that is no such multiple.
        k (`int`, *optional*, defaults to 32): Latents that are active for each token; on average, for activations that
            select by a threshold, where it may be None if it is not known.
        activation (`str`, defaults to `"topk"`): How latents are selected. `"topk"`; `"groupmax"`; `"batchtopk"`, the
            largest of a batch in training, and all above a threshold after; `"jumprelu"`, all above a threshold of the
            latent's own; `"relu"` and `"gated"` and `"signed_topk"`, which keeps the largest by magnitude with their
            sign, are there to read what others trained.
        bandwidth (`float`, defaults to 0.1): `jumprelu` only: width of the kernel by which thresholds get a gradient,
            as a part of the threshold.
        normalize_input (`str`, *optional*): What is done to each activation before it is encoded, and undone to the
            reconstruction: `"layer_norm"`, to mean 0 and standard deviation 1, or `"constant_norm"`, to the norm
            `sqrt(d_in)`.
        normalize_decoder (`bool`): Whether training keeps the decoder's rows at unit norm.
        apply_b_dec_to_input (`bool`): Whether `b_dec` is taken from the input before it is encoded.
        encoder_only (`bool`, defaults to `False`): Build no decoder; the head can encode but not reconstruct.
        hookpoint (`str`, *optional*): Module of the LM's base model at which the head was trained.
        source (`str`, *optional*): Module whose output it reads, if that is not the hookpoint's own input or output.
        aliases (`list[str]`, *optional*): Names of the hookpoint in other libraries, such as
            `blocks.10.hook_resid_post`.
        base_model_name_or_path (`str`, *optional*): The LM it was trained on.
        base_model_revision (`str`, *optional*): That LM's commit.

    Raises:
        `ValueError`: if the sizes disagree, such as k above num_latents.
    """

    # What a recipe and tables call the kind, and whether it reads its hookpoint's input where no source is named.
    kind: ClassVar[str]
    reads_input: ClassVar[bool] = False
    # The tag of a model card, and the paper that it credits: what, who, and the arXiv id.
    tag: ClassVar[str]
    paper: ClassVar[tuple[str, str, str] | None] = None
    # A head without a width means nothing, so there is no default config to compare a saved one with.
    has_no_defaults_at_init: ClassVar[bool] = True

    d_in: int = 0
    if TYPE_CHECKING:
        # None until `__post_init__` alone.
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
        Where a head of this kind reads; what it reads at several places is joined along the last dimension.

        Args:
            hookpoint (`str`): Module of the LM's base model at which it sits.
            source (`str`, *optional*): Module whose output it reads instead.
        """
        if source is not None:
            return ((source, "output"),)
        return ((hookpoint, "input" if cls.reads_input else "output"),)

    @classmethod
    def predicts_at(cls, hookpoint: str) -> tuple[ModuleSide, ...]:
        """Where that lies which a head of this kind reproduces; what lies at several places is joined."""
        return ((hookpoint, "output"),)

    @classmethod
    def from_entry(cls, entry: HeadArguments, **fields: Any) -> Self:
        """
        The config of a head that an entry of a recipe asks for.

        Args:
            entry ([`HeadArguments`]): The entry.
            fields (*optional*): What follows from the LM: `d_in`, `d_out`, `num_latents`, `hookpoint`, `source`.
        """
        return cls(expansion_factor=entry.expansion_factor, k=entry.k, activation=entry.activation, **fields)

    @property
    def trained_k(self) -> int:
        """
        `k`, where it must be known.

        Raises:
            `ValueError`: if it is not.
        """
        if self.k is None:
            raise ValueError("The head's files do not tell k, which training needs. Set head.config.k.")
        return self.k

    @property
    def title(self) -> str:
        """What a card's table calls the kind."""
        return self.kind

    @property
    def long_titles(self) -> tuple[str, str]:
        """What a card calls one head of the kind, and several."""
        return self.title, f"{self.title}s"

    @property
    def widths(self) -> str:
        """`d_in -> latents -> d_out`, in words."""
        return f"{self.d_in:,} -> {self.num_latents:,} -> {self.d_out:,}"

    @property
    def num_parameters(self) -> int:
        """Weights of a head, without its thresholds or gates, which have one number for each latent."""
        skip = self.d_in * self.d_out if self.skip_connection else 0
        return self.num_latents * (self.d_in + self.d_out + 1) + self.d_out + skip

    def validate_architecture(self) -> None:
        """Checks that the sizes agree; called at construction and when the config is saved."""
        if self.d_in < 1:
            raise ValueError(f"d_in is {self.d_in}, but a head needs the width of its input, a positive number.")
        if self.activation not in SELECTIONS:
            raise ValueError(f"activation is {self.activation!r}; allowed are {', '.join(SELECTIONS)}.")
        if self.normalize_input not in (None, "layer_norm", "constant_norm"):
            raise ValueError(
                f"normalize_input is {self.normalize_input!r}; allowed are layer_norm, constant_norm and none at all."
            )
        if self.k is None and SELECTIONS[self.activation].counts:
            raise ValueError(f"k is None, but {self.activation} selects k latents for each token. Give it.")
        if self.k is not None and not 1 <= self.k <= self.num_latents:
            raise ValueError(f"k is {self.k}, but it must be from 1 to num_latents, {self.num_latents}.")
        if self.activation == "groupmax" and self.num_latents % self.trained_k:
            raise ValueError(
                f"groupmax cuts {self.num_latents} latents into k = {self.k} equal groups, which does not divide. "
                "Change k or num_latents."
            )

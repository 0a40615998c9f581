from pathlib import Path
from typing import Any, overload

from ..common.errors import InputError, near
from ..common.signals import tell
from ..formats import Place
from ..models.modeling_head import HeadModel
from .find import find_heads, newest_checkpoint
from .head_files import TELLING
from .repository import HUB_OPTIONS, Repository
from .sae_heads import SaeHeads


# What becomes of a head once its files are here, as in transformers.
_LOADING = ("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder")


class AutoSae:
    """
    Loads SAEs and transcoders from a folder, a file or the Hub: ours, and those of sparsify, SAELens, Gemma Scope,
    Llama Scope, dictionary_learning, OpenAI, Goodfire, Qwen Scope and circuit-tracer, told apart by their files.
    """

    def __init__(self) -> None:
        raise TypeError("AutoSae is not instantiated. Use AutoSae.from_pretrained.")

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, hookpoint: str, subfolder: str | None = None, **kwargs: Any
    ) -> HeadModel: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, hookpoint: None = None, *, subfolder: str, **kwargs: Any
    ) -> HeadModel: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        hookpoint: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> HeadModel | SaeHeads: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        hookpoint: str | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> HeadModel | SaeHeads:
        """
        The head of a folder or repo that holds one; the heads by name where it holds several.

        Args:
            pretrained_model_name_or_path (`str`): A folder, a file, or a repo such as `EleutherAI/sae-llama-3-8b-32x`.
            hookpoint (`str`, *optional*): Name of the head to load, ours or that of the library that it is from.
            subfolder (`str`, *optional*): The same, as transformers calls it.
            kwargs (*optional*): As in transformers: `dtype`, `device_map`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`. `encoder_only=True` reads no decoder. What the files of another
                library do not tell can be given: `base_model_name_or_path`, `normalize_input`,
                `apply_b_dec_to_input=True` for sparsify's transcoders of before February 2025, `k` for Qwen Scope's
                files outside of their repo, and `input_scale`, `sqrt(d_in)` over the average norm of inputs, for
                heads of SAELens that were trained on inputs multiplied by it.

        Returns:
            [`SaeModel`], [`TranscoderModel`] or [`SaeHeads`].

        Raises:
            `InputError`: if there is no such folder, repo or head, no head in it, or no telling whether it holds one
                or several, because the Hub is not asked.

        Examples:
            ```python
            sae = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x", hookpoint="layers.10")
            ```
        """
        _check_names("from_pretrained", kwargs, ("hookpoint", "subfolder"))
        # Transformers' own default is an empty one.
        subfolder = subfolder or None
        if None not in (hookpoint, subfolder) and hookpoint != subfolder:
            raise InputError(
                f"hookpoint is {hookpoint!r} and subfolder {subfolder!r}, but both name the head to load. Give one."
            )
        repository, places = _find(str(pretrained_model_name_or_path), kwargs)
        heads = SaeHeads(repository, places, kwargs)
        if (named := subfolder if hookpoint is None else hookpoint) is not None:
            return heads[named]
        if len(heads) > 1:
            _tell_of_cache(heads)
            return heads
        (name, place), *_ = places.items()
        if repository.from_cache and place.name:
            raise InputError(
                f"{repository.name!r} has head {name!r} in the cache, and may have others that only the Hub knows of. "
                f"Name it by hookpoint={name!r}, or take the mapping of what is in the cache by AutoSae.open."
            )
        return heads[name]

    @classmethod
    def open(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> SaeHeads:
        """
        The heads of a folder or repo by name, be they one or many; otherwise like `from_pretrained`.

        Raises:
            `InputError`: if there is no such folder or repo, or no head in it.
        """
        _check_names("open", kwargs)
        heads = SaeHeads(*_find(str(pretrained_model_name_or_path), kwargs), kwargs)
        _tell_of_cache(heads)
        return heads


def _tell_of_cache(heads: SaeHeads) -> None:
    if heads.from_cache:
        tell(
            f"{heads.origin!r}: {heads.from_cache}, so these are the {len(heads)} heads that are in the cache. There "
            "may be more."
        )


def _check_names(method: str, given: dict[str, Any], own: tuple[str, ...] = ()) -> None:
    allowed = (*own, *HUB_OPTIONS, *TELLING, *_LOADING)
    for name in given:
        if name not in allowed:
            raise InputError(
                f"AutoSae.{method} takes no argument {name!r}.{near(name, allowed)} It takes {', '.join(allowed)}."
            )


def _find(name: str, options: dict[str, Any]) -> tuple[Repository, dict[str, Place]]:
    """A folder or repo and its heads by name; takes what says where files are out of the options."""
    repository = Repository(name, **{key: options.pop(key, None) for key in HUB_OPTIONS})
    places = find_heads(repository.files, name)
    if places:
        return repository, places
    if repository.folder and (newest := newest_checkpoint(repository.files, name)):
        raise InputError(
            f"{name!r} holds no SAE or transcoder at its top, as a run has when it ends, but checkpoints of one. Load "
            f"the newest, {str(repository.folder / newest)!r}."
        )
    raise InputError(
        f"{name!r} holds no SAE or transcoder: neither config.json with model.safetensors, nor the files of "
        "sparsify, SAELens, Gemma Scope, Llama Scope, dictionary_learning or circuit-tracer, nor heads that "
        "torch saved."
    )

"""
Loads heads by the name of a folder, a file or a repo.

The library of a head is found from its files. Nothing but the list of files is read at first, so a repo with 500 heads
opens at once; a head's own files are fetched when it is loaded.
"""

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


# Arguments for the loading of a head whose files are here, as in transformers.
_LOADING = ("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder")


class AutoSae:
    """
    Loads SAEs and transcoders from a folder, a file or the Hub. It reads our own layout, and the layouts of sparsify,
    SAELens, Gemma Scope, Llama Scope, dictionary_learning, OpenAI, Goodfire, Qwen Scope and circuit-tracer; the files
    tell which layout it is.

    Examples:
        ```python
        from sae_accel import AutoSae

        sae = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x", hookpoint="layers.10")
        saes = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x")  # every head, by name
        ```
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
        Loads the only head of a folder or repo, or returns its heads by name if it holds several.

        Args:
            pretrained_model_name_or_path (`str`): A folder, a file, or a repo such as `EleutherAI/sae-llama-3-8b-32x`.
            hookpoint (`str`, *optional*): Name of the head to load, ours or the one in its own library.
            subfolder (`str`, *optional*): The same as `hookpoint`, under the name that transformers uses.
            kwargs (*optional*): As in transformers: `dtype`, `device_map`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`. `encoder_only=True` reads no decoder. Give here what the files of
                another library do not tell: `base_model_name_or_path`; `normalize_input`; `apply_b_dec_to_input=True`
                for sparsify's transcoders from before February 2025; `k` for Qwen Scope's files outside their repo;
                `input_scale`, `sqrt(d_in)` over the average norm of the inputs, for SAELens heads that were trained on
                inputs multiplied by it.

        Returns:
            [`SaeModel`] or [`TranscoderModel`] for one head, [`SaeHeads`] for several.

        Raises:
            `InputError`: if there is no such folder, repo or head, if it holds no head, or if only the cache was read
                and the repo may hold more heads than the one in the cache.

        Examples:
            ```python
            from sae_accel import AutoSae

            sae = AutoSae.from_pretrained("runs/quickstart", hookpoint="layers.1")
            half = AutoSae.from_pretrained("runs/quickstart", hookpoint="layers.1", dtype=torch.bfloat16)
            ```

            Without `hookpoint`, a folder or repo with several heads gives a mapping. It loads a head when you ask for
            it:

            ```python
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x")
            list(saes)  # ["layers.1", "layers.2", "layers.10"]
            saes["layers.10"].config.num_latents
            ```

            To find which latents are active, the encoder is enough. It takes half of the memory:

            ```python
            from sae_accel import AutoSae

            encoder = AutoSae.from_pretrained("runs/quickstart", hookpoint="layers.1", encoder_only=True)
            encoder.encode(hidden).top_indices  # (1, tokens, k)
            ```
        """
        _check_names("from_pretrained", kwargs, ("hookpoint", "subfolder"))
        # The default of transformers is an empty string.
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
                f"Give hookpoint={name!r}, or use AutoSae.open for a mapping of the heads in the cache."
            )
        return heads[name]

    @classmethod
    def open(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> SaeHeads:
        """
        Returns the heads of a folder or repo by name, also if there is only one; otherwise like `from_pretrained`.

        Raises:
            `InputError`: if there is no such folder or repo, or it holds no head.

        Examples:
            ```python
            from sae_accel import AutoSae

            for name, sae in AutoSae.open("runs/quickstart").items():
                print(name, sae.config.num_latents)
            ```
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
    """Finds a folder or repo and its heads by name; removes the options that say where the files are."""
    repository = Repository(name, **{key: options.pop(key, None) for key in HUB_OPTIONS})
    places = find_heads(repository.files, name)
    if places:
        return repository, places
    if repository.folder and (newest := newest_checkpoint(repository.files, name)):
        raise InputError(
            f"{name!r} holds no SAE or transcoder at its top, where a run writes them at its end, but checkpoints. "
            f"Load the newest, {str(repository.folder / newest)!r}."
        )
    raise InputError(
        f"{name!r} holds no SAE or transcoder: neither config.json with model.safetensors, nor the files of "
        "sparsify, SAELens, Gemma Scope, Llama Scope, dictionary_learning or circuit-tracer, nor heads that "
        "torch saved."
    )

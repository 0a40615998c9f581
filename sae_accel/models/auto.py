import re
from collections.abc import Iterator
from typing import Any

from ..errors import InputError, near
from ..formats import LAYOUTS, Place, torch_files
from ..formats.folders import folders_of
from .modeling_head import HeadModel
from .repository import HUB_OPTIONS, Repository
from .sae_heads import TELLING, SaeHeads


# What becomes of a head once its files are here, as in transformers.
_LOADING = ("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder")
_INDEX = "model.safetensors.index.json"


class AutoSae:
    """
    Loads SAEs and transcoders from a folder, a file or the Hub: ours, and those of sparsify, SAELens, Gemma Scope,
    Llama Scope, dictionary_learning, OpenAI, Goodfire, Qwen Scope and circuit-tracer, told apart by their files.
    """

    def __init__(self) -> None:
        raise TypeError("AutoSae is not instantiated. Use AutoSae.from_pretrained.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, hookpoint: str | None = None, **kwargs: Any
    ) -> HeadModel | SaeHeads:
        """
        The head of a folder or repo that holds one; the heads by name where it holds several.

        Args:
            pretrained_model_name_or_path (`str`): A folder, a file, or a repo such as `EleutherAI/sae-llama-3-8b-32x`.
            hookpoint (`str`, *optional*): Name of the head to load, ours or that of the library that it is from;
                `subfolder` is an alias.
            kwargs (*optional*): As in transformers: `dtype`, `device_map`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`. `encoder_only=True` reads no decoder. What the files of another
                library do not tell can be given: `base_model_name_or_path`, `normalize_input`,
                `apply_b_dec_to_input=True` for sparsify's transcoders of before February 2025, `k` for Qwen Scope's
                files outside of their repo, and `input_scale`, `sqrt(d_in)` over the average norm of inputs, for
                heads of SAELens that were trained on inputs multiplied by it.

        Returns:
            [`SaeModel`], [`TranscoderModel`] or [`SaeHeads`].

        Raises:
            `InputError`: if there is no such folder, repo or head, or no head in it.

        Examples:
            ```python
            sae = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x", hookpoint="layers.10")
            ```
        """
        hookpoint = kwargs.pop("subfolder", None) or hookpoint
        heads = cls.open(pretrained_model_name_or_path, **kwargs)
        if hookpoint is not None:
            return heads[hookpoint]
        return heads[next(iter(heads))] if len(heads) == 1 else heads

    @classmethod
    def open(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> SaeHeads:
        """
        The heads of a folder or repo by name, be they one or many; otherwise like `from_pretrained`.

        Raises:
            `InputError`: if there is no such folder or repo, or no head in it.
        """
        name = str(pretrained_model_name_or_path)
        _check_names(kwargs)
        repository = Repository(name, **{key: kwargs.pop(key, None) for key in HUB_OPTIONS})
        places = find_heads(repository.files, name)
        if not places:
            raise InputError(
                f"{name!r} holds no SAE or transcoder: neither config.json with model.safetensors, nor the files of "
                "sparsify, SAELens, Gemma Scope, Llama Scope, dictionary_learning or circuit-tracer, nor heads that "
                "torch saved."
            )
        return SaeHeads(repository, places, kwargs)


def _check_names(given: dict[str, Any]) -> None:
    allowed = ("hookpoint", "subfolder", *HUB_OPTIONS, *TELLING, *_LOADING)
    for name in given:
        if name not in allowed:
            raise InputError(
                f"AutoSae takes no argument {name!r}.{near(name, allowed)} It takes {', '.join(allowed)}."
            )


def find_heads(files: list[str], origin: str) -> dict[str, Place]:
    """
    Heads by name, told by the names of files alone.

    Args:
        files (`list[str]`): All files of a folder or repo, by their paths in it.
        origin (`str`): The folder or repo.
    """
    found = list(_our_places(files, origin))
    for layout in LAYOUTS:
        if layout is torch_files and found:
            # Beside heads that say what they are, what torch saved is something else.
            break
        taken = {file for place in found for role, file in place.files.items() if role == "weights"}
        for place in layout.find([file for file in files if file not in taken], origin):
            place.layout = layout
            found.append(place)
    names = [place.name for place in found]
    if twice := next((place.name for place in found if names.count(place.name) > 1), None):
        both = [file for place in found if place.name == twice for file in place.files.values()]
        raise InputError(f"{origin!r} has two heads in one folder: {', '.join(both)}. Keep one of them there.")
    labels = [place.label for place in found]
    return {place.label if labels.count(place.label) == 1 else place.name: place for place in found}


def _our_places(files: list[str], origin: str) -> Iterator[Place]:
    for folder, inside in folders_of(files):
        weights = [name for name in inside if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]
        if "config.json" in inside and {"model.safetensors", _INDEX} & set(weights):
            yield Place(folder, {"config": inside["config.json"]} | {name: inside[name] for name in weights}, origin)

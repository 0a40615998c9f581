import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from ..errors import InputError
from ..formats import sparsify
from .configuration_head import HeadConfig
from .configuration_sae import SaeConfig
from .modeling_head import HeadModel
from .modeling_sae import SaeModel
from .modeling_transcoder import TranscoderModel
from .quiet import quiet_files
from .repository import HUB_OPTIONS, Repository


# Folders of a run that hold other things than its heads.
NOT_HEADS = re.compile(r"(checkpoint-\d+|best|logs|\..*)")


class HeadNotFound(InputError, KeyError):
    """A folder or repo has no head of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class SaeHeads(Mapping):
    """
    The heads of a folder or repo by name, in natural order (`layers.2` before `layers.10`). A head is fetched and
    loaded when it is first asked for, and kept.

    Examples:
        ```python
        saes = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x")
        list(saes)  # names; nothing is loaded
        saes["layers.10"].encode(hidden_state)
        ```
    """

    def __init__(self, repository: Repository, layouts: dict[str, str], options: dict[str, Any]):
        self._repository = repository
        self._layouts = {name: layouts[name] for name in sorted(layouts, key=natural_key)}
        self._options = options
        self._loaded: dict[str, HeadModel] = {}

    def __getitem__(self, name: str) -> HeadModel:
        if name not in self._layouts:
            near = difflib.get_close_matches(name, self._layouts, n=4, cutoff=0.4) or list(self._layouts)[:4]
            raise HeadNotFound(f"{self._repository.name!r} has no head {name!r}. Near names: {', '.join(near)}.")
        if name not in self._loaded:
            self._loaded[name] = _load(self._repository, name, self._layouts[name], self._options)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._layouts

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def __repr__(self) -> str:
        names = "\n".join(f"  {name}{' (loaded)' if name in self._loaded else ''}" for name in self)
        return f"{len(self)} heads in {self._repository.name!r}:\n{names}"


class AutoSae:
    """Loads SAEs and transcoders from a folder or the Hub, in our layout or in sparsify's."""

    def __init__(self) -> None:
        raise TypeError("AutoSae is not instantiated. Use AutoSae.from_pretrained.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, hookpoint: str | None = None, **kwargs: Any
    ) -> HeadModel | SaeHeads:
        """
        The head of a folder or repo that holds one; the heads by name where it holds several.

        Args:
            pretrained_model_name_or_path (`str`): A folder, or a repo such as `EleutherAI/sae-llama-3-8b-32x`.
            hookpoint (`str`, *optional*): Name of the head to load; `subfolder` is an alias.
            kwargs (*optional*): As in transformers: `dtype`, `device_map`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`. `encoder_only=True` reads no decoder. `apply_b_dec_to_input=True`
                is for sparsify's transcoders of before February 2025, whose files do not tell that `b_dec` is taken
                from the input.

        Returns:
            [`SaeModel`], [`TranscoderModel`] or [`SaeHeads`].

        Raises:
            `InputError`: if there is no such folder, repo or head, or no head in it.

        Examples:
            ```python
            sae = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x", hookpoint="layers.10")
            ```
        """
        name = str(pretrained_model_name_or_path)
        hookpoint = kwargs.pop("subfolder", None) or hookpoint
        repository = Repository(name, **{key: kwargs.pop(key, None) for key in HUB_OPTIONS})
        layouts = _find_heads(repository.files)
        if not layouts:
            raise InputError(
                f"{name!r} holds no SAE or transcoder: no folder in it has config.json with model.safetensors, or "
                "cfg.json with sae.safetensors."
            )
        heads = SaeHeads(repository, layouts, kwargs)
        if hookpoint is not None:
            return heads[hookpoint]
        return heads[next(iter(heads))] if len(heads) == 1 else heads


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _find_heads(files: list[str]) -> dict[str, str]:
    """Names of heads and the layout of each, told by the files alone."""
    folders: dict[str, set[str]] = {}
    for file in map(PurePosixPath, files):
        if not any(NOT_HEADS.fullmatch(part) for part in file.parts[:-1]):
            folders.setdefault("" if file.parent == PurePosixPath(".") else str(file.parent), set()).add(file.name)
    layouts = {}
    for name, inside in folders.items():
        if "config.json" in inside and inside & {"model.safetensors", "model.safetensors.index.json"}:
            layouts[name] = "sae_accel"
        elif {sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE} <= inside:
            layouts[name] = "sparsify"
    return layouts


def _load(repository: Repository, name: str, layout: str, options: dict[str, Any]) -> HeadModel:
    where = f"head {name!r} of {repository.name!r}" if name else repr(repository.name)
    try:
        with quiet_files():
            load = _load_sparsify if layout == "sparsify" else _load_ours
            head = load(repository, name, dict(options))
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{where} cannot be loaded: {' '.join(str(error).split())}") from error
    if head.config.hookpoint is None and name:
        head.config.hookpoint = name.split("/")[0]
    return head


def _load_ours(repository: Repository, name: str, options: dict[str, Any]) -> HeadModel:
    where = {"pretrained_model_name_or_path": repository.folder or repository.name, "subfolder": name}
    # An LM has files of the same names, and must not be loaded to find that out.
    config = AutoConfig.from_pretrained(**where, **repository.options)
    if not isinstance(config, HeadConfig):
        raise ValueError(f"it is a {config.model_type}, not an SAE or transcoder.")
    return _model_class(config).from_pretrained(**where, use_safetensors=True, **repository.options, **options)


def _load_sparsify(repository: Repository, name: str, options: dict[str, Any]) -> HeadModel:
    files = (str(PurePosixPath(name) / file) for file in (sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE))
    config, tensors = sparsify.read_head(*map(repository.fetch, files))
    for key in ("encoder_only", "apply_b_dec_to_input"):
        if key in options:
            setattr(config, key, options.pop(key))
    options.setdefault("dtype", tensors["encoder.weight"].dtype)
    return _model_class(config).from_pretrained(None, config=config, state_dict=tensors, **options)


def _model_class(config: HeadConfig) -> type[HeadModel]:
    return SaeModel if isinstance(config, SaeConfig) else TranscoderModel

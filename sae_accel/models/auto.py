import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
NOT_HEADS = re.compile(r"(checkpoint-\d+|best|logs|adapter|\..*)")


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
        if name not in self._loaded:
            self._loaded[name] = self.load(name)
        return self._loaded[name]

    @property
    def origin(self) -> str:
        """The folder or repo."""
        return self._repository.name

    def load(self, name: str) -> HeadModel:
        """
        A head, loaded anew and not kept.

        Raises:
            `InputError`: if there is no such head, or it cannot be read.
        """
        return _load(self._repository, name, self._layout(name), self._options)

    def config(self, name: str) -> HeadConfig:
        """
        A head's config, without its weights.

        Raises:
            `InputError`: if there is no such head, or it cannot be read.
        """
        with _reading(self._repository, name):
            read = _sparsify_config if self._layout(name) == "sparsify" else _our_config
            return read(self._repository, name)

    def _layout(self, name: str) -> str:
        if name not in self._layouts:
            near = difflib.get_close_matches(name, self._layouts, n=4, cutoff=0.4) or list(self._layouts)[:4]
            raise HeadNotFound(f"{self.origin!r} has no head {name!r}. Near names: {', '.join(near)}.")
        return self._layouts[name]

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
        repository = Repository(name, **{key: kwargs.pop(key, None) for key in HUB_OPTIONS})
        layouts = _find_heads(repository.files)
        if not layouts:
            raise InputError(
                f"{name!r} holds no SAE or transcoder: no folder in it has config.json with model.safetensors, or "
                "cfg.json with sae.safetensors."
            )
        return SaeHeads(repository, layouts, kwargs)


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


@contextmanager
def _reading(repository: Repository, name: str) -> Iterator[None]:
    """Says of what cannot be read which head it is."""
    where = f"head {name!r} of {repository.name!r}" if name else repr(repository.name)
    try:
        with quiet_files():
            yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{where} cannot be loaded: {' '.join(str(error).split())}") from error


def _load(repository: Repository, name: str, layout: str, options: dict[str, Any]) -> HeadModel:
    with _reading(repository, name):
        load = _load_sparsify if layout == "sparsify" else _load_ours
        head = load(repository, name, dict(options))
    if head.config.hookpoint is None and name:
        head.config.hookpoint = name.split("/")[0]
    return head


def _our_config(repository: Repository, name: str) -> HeadConfig:
    # An LM has files of the same names, and must not be loaded to find that out.
    config = AutoConfig.from_pretrained(repository.folder or repository.name, subfolder=name, **repository.options)
    if not isinstance(config, HeadConfig):
        raise ValueError(f"it is a {config.model_type}, not an SAE or transcoder.")
    return config


def _load_ours(repository: Repository, name: str, options: dict[str, Any]) -> HeadModel:
    model_class = _model_class(_our_config(repository, name))
    where = {"pretrained_model_name_or_path": repository.folder or repository.name, "subfolder": name}
    return model_class.from_pretrained(**where, use_safetensors=True, **repository.options, **options)


def _sparsify_files(repository: Repository, name: str) -> list[str]:
    return [
        repository.fetch(str(PurePosixPath(name) / file)) for file in (sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE)
    ]


def _sparsify_config(repository: Repository, name: str) -> HeadConfig:
    config, _ = sparsify.read_head(*_sparsify_files(repository, name))
    config.hookpoint = name.split("/")[0] or None
    return config


def _load_sparsify(repository: Repository, name: str, options: dict[str, Any]) -> HeadModel:
    config, tensors = sparsify.read_head(*_sparsify_files(repository, name))
    for key in ("encoder_only", "apply_b_dec_to_input"):
        if key in options:
            setattr(config, key, options.pop(key))
    options.setdefault("dtype", tensors["encoder.weight"].dtype)
    return _model_class(config).from_pretrained(None, config=config, state_dict=tensors, **options)


def _model_class(config: HeadConfig) -> type[HeadModel]:
    return SaeModel if isinstance(config, SaeConfig) else TranscoderModel

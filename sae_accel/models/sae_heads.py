import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig

from ..errors import InputError
from ..formats import Place
from ..formats.tensor_file import open_tensors
from ..globs import glob_to_regex
from .configuration_head import HeadConfig
from .configuration_sae import SaeConfig
from .modeling_head import HeadModel, push_saved
from .modeling_sae import SaeModel
from .modeling_transcoder import TranscoderModel
from .quiet import quiet_files
from .repository import Repository


# What a user may say of a head that the files of its library do not tell.
TELLING = ("apply_b_dec_to_input", "base_model_name_or_path", "encoder_only", "input_scale", "k", "normalize_input")
# What a damaged file, or one that holds something else than it should, makes a reader run into.
_BROKEN = (LookupError, TypeError, AttributeError, EOFError, ArithmeticError, AssertionError)


class HeadNotFound(InputError, KeyError):
    """A folder or repo has no head of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class SaeHeads(Mapping):
    """
    The heads of a folder or repo by name, in natural order (`layers.2` before `layers.10`). A head is fetched and
    loaded when it is first asked for, and kept. What another library calls it is a name too.

    Examples:
        ```python
        saes = AutoSae.from_pretrained("EleutherAI/sae-llama-3-8b-32x")
        list(saes)  # names; nothing is loaded
        saes["layers.10"].encode(hidden_state)
        saes.select("layers.[0-3]", "layers.*.mlp")  # those heads, as another mapping
        ```
    """

    def __init__(self, repository: Repository, places: dict[str, Place], options: dict[str, Any]):
        self._repository = repository
        self._places = {name: places[name] for name in sorted(places, key=natural_key)}
        self._options = options
        self._loaded: dict[str, HeadModel] = {}

    def __getitem__(self, name: str) -> HeadModel:
        name = self._name(name)
        if name not in self._loaded:
            self._loaded[name] = self.load(name)
        return self._loaded[name]

    @property
    def origin(self) -> str:
        """The folder or repo."""
        return self._repository.name

    def select(self, *patterns: str) -> "SaeHeads":
        """
        The heads whose names match, still to be loaded, in natural order.

        Args:
            patterns (`str`): Globs over names, or over the hookpoints that they begin with: `*`, `?` and `[012]` stay
                within one component, `**` crosses dots.

        Raises:
            `HeadNotFound`: if a pattern matches nothing.
        """
        chosen: dict[str, Place] = {}
        for pattern in patterns:
            matches = re.compile(glob_to_regex(pattern)).fullmatch
            found = [name for name in self if matches(name) or matches(name.split("/")[0])]
            found = found or self._by_config(pattern)
            if not found:
                raise HeadNotFound(f"{self.origin!r} has no head that {pattern!r} matches. {self._near(pattern)}")
            chosen |= {name: self._places[name] for name in found}
        heads = SaeHeads(self._repository, chosen, self._options)
        heads._loaded = {name: head for name, head in self._loaded.items() if name in chosen}
        return heads

    def load(self, name: str) -> HeadModel:
        """
        A head, loaded anew and not kept.

        Raises:
            `InputError`: if there is no such head, or it cannot be read.
        """
        name = self._name(name)
        place = self._places[name]
        with _reading(self._repository, name):
            self._fetch(place)
            with quiet_files():
                head = _load(place, dict(self._options))
        head.config.name_or_path = self.origin
        _complete(head.config, name, place)
        return head

    def config(self, name: str) -> HeadConfig:
        """
        A head's config, without its weights.

        Raises:
            `InputError`: if there is no such head, or it cannot be read.
        """
        name = self._name(name)
        place = self._places[name]
        with _reading(self._repository, name):
            if place.layout is None:
                place.paths = {"config": Path(self._repository.fetch(place.files["config"]))}
                config = _our_config(place)
            else:
                self._fetch(place)
                config = place.layout.open_head(_told(place, self._options)).config
        _complete(config, name, place)
        return config

    def files(self, name: str) -> list[str]:
        """
        A head's files in the folder or repo.

        Raises:
            `InputError`: if there is no such head.
        """
        return list(self._places[self._name(name)].files.values())

    def is_ours(self, name: str) -> bool:
        """
        Whether a head is in our layout.

        Raises:
            `InputError`: if there is no such head.
        """
        return self._places[self._name(name)].layout is None

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Writes every head in our layout, one folder each, loading one at a time.

        Args:
            save_directory (`str` or `Path`): Where; made if it does not exist.
        """
        for name in self:
            head = self._loaded.get(name) or self.load(name)
            with quiet_files():
                head.save_pretrained(Path(save_directory) / name)

    def push_to_hub(self, repo_id: str, license: str | None = None, **kwargs: Any) -> Any:
        """
        Releases every head in our layout, in one commit, with a model card. They are first written to a temporary
        folder, one at a time.

        Args:
            repo_id (`str`): Where to: `name` or `user/name`.
            license (`str`, *optional*): The Hub's identifier of a license, for the card.
            kwargs (*optional*): `private`, `revision`, `token` and `message`, as of [`Release.push`].

        Returns:
            [`Pushed`].

        Raises:
            `InputError`: if a head cannot be read, the Hub refuses, or it cannot be reached.
        """
        return push_saved(self.save_pretrained, repo_id, license, **kwargs)

    def _fetch(self, place: Place) -> None:
        place.paths = {role: Path(self._repository.fetch(file)) for role, file in place.files.items()}

    def _name(self, name: str) -> str:
        """The name of a head here, by that, by another library's, or by a hookpoint with no other head."""
        if name in self._places:
            return name
        for ours, place in self._places.items():
            if name == place.name:
                return ours
        at_hookpoint = [ours for ours in self._places if ours.split("/")[0] == name] or self._by_config(name)
        if len(at_hookpoint) == 1:
            return at_hookpoint[0]
        if at_hookpoint:
            raise HeadNotFound(
                f"{self.origin!r} has several heads at {name!r}: {', '.join(at_hookpoint[:6])}. Name one."
            )
        raise HeadNotFound(f"{self.origin!r} has no head {name!r}. {self._near(name)}")

    def _by_config(self, name: str) -> list[str]:
        """Heads at a hookpoint, or of a hook's name, that only their configurations tell of."""
        silent = [ours for ours, place in self._places.items() if place.hookpoint is None and "config" in place.files]
        found = []
        for ours in silent:
            config = self.config(ours)
            if name == config.hookpoint or name in (config.aliases or []):
                found.append(ours)
        return found

    def _near(self, name: str) -> str:
        if list(self._places) == [""]:
            return "Its only head lies at the top: leave hookpoint out."
        near = difflib.get_close_matches(name, self._places, n=4, cutoff=0.4) or list(self._places)[:4]
        cached = " The Hub could not be asked, so only what is in the cache was looked at."
        return f"Near names: {', '.join(near)}.{cached if self._repository.from_cache else ''}"

    def __contains__(self, name: object) -> bool:
        return name in self._places or any(place.name == name for place in self._places.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        names = "\n".join(f"  {name}{' (loaded)' if name in self._loaded else ''}" for name in self)
        return f"{len(self)} heads in {self._repository.name!r}:\n{names}"


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


@contextmanager
def _reading(repository: Repository, name: str) -> Iterator[None]:
    """Says of what cannot be read which head it is."""
    where = f"head {name!r} of {repository.name!r}" if name else repr(repository.name)
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, InputError) and repository.name in str(error):
            raise
        raise InputError(f"{where} cannot be loaded: {' '.join(str(error).split())}") from error
    except _BROKEN as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{where} cannot be loaded, because its files hold what they should not ({what}).") from error


def _load(place: Place, options: dict[str, Any]) -> HeadModel:
    if place.layout is None:
        # An LM has files of the same names, and must not be loaded to find that out.
        if "input_scale" in options:
            raise ValueError("input_scale was given, which is for heads of SAELens.")
        config = _our_config(place)
        model_class = _model_class(config)
        _check_shapes(place, config)
        return model_class.from_pretrained(place.paths["config"].parent, use_safetensors=True, **options)
    # As transformers, which takes the older name too.
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    head = place.layout.open_head(_told(place, options))
    tensors = head.read()
    options = {key: value for key, value in options.items() if key not in TELLING}
    options.setdefault("dtype", tensors["encoder.weight"].dtype)
    return _model_class(head.config).from_pretrained(None, config=head.config, state_dict=tensors, **options)


def _check_shapes(place: Place, config: HeadConfig) -> None:
    """What transformers would report in a table of its own."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in _model_class(config)(config).state_dict().items()}
    for role, path in place.paths.items():
        if role.endswith(".safetensors"):
            for name, shape in open_tensors(path).shapes.items():
                if shape != expected.get(name, shape):
                    raise ValueError(
                        f"by config.json {name} should have shape {expected[name]}, but in {role} it has {shape}."
                    )


def _told(place: Place, options: dict[str, Any]) -> Place:
    return replace(place, given={key: value for key, value in options.items() if key in TELLING})


def _our_config(place: Place) -> HeadConfig:
    config = AutoConfig.from_pretrained(place.paths["config"].parent)
    if not isinstance(config, HeadConfig):
        raise ValueError(f"it is a {config.model_type}, not an SAE or transcoder.")
    return config


def _complete(config: HeadConfig, name: str, place: Place) -> None:
    """What names tell of where a head sits, where its files do not."""
    if place.layout is None and config.hookpoint is None and name:
        config.hookpoint = name.split("/")[0]
    if place.layout is not None and config.hookpoint is None:
        config.hookpoint = place.hookpoint
    if place.layout is not None and place.name and place.name.split("/")[0] != config.hookpoint:
        config.aliases = list(dict.fromkeys([*(config.aliases or []), place.name]))


def _model_class(config: HeadConfig) -> type[HeadModel]:
    return SaeModel if isinstance(config, SaeConfig) else TranscoderModel

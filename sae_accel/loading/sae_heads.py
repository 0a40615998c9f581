"""
A mapping from names to heads, which loads a head when it is first used.

A head has several names: ours (`layers.10`), its name in its own library, and the TransformerLens hook of its
hookpoint. All of them work. Names are compared with file names first; a config is only fetched if the file names do
not tell where a head sits.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.globs import glob_to_regex
from ..common.quiet import quiet_files
from ..common.staging import staging_folder
from ..formats import Place
from ..formats.hook_names import inner_names, lens_name
from ..models.configuration_head import HeadConfig
from ..models.modeling_head import HeadModel
from ..models.releasing import push_saved
from .head_files import check_devices, head_errors, load_head, stored_config
from .repository import Repository


class HeadNotFound(InputError, KeyError):
    """A folder or repo has no head of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class SaeHeads(Mapping[str, HeadModel]):
    """
    The heads of a folder or repo by name, in natural order (`layers.2` before `layers.10`). A head is fetched and
    loaded when it is first asked for, and kept. The name of a head in its own library works too.

    Examples:
        ```python
        from sae_accel import AutoSae

        saes = AutoSae.from_pretrained("runs/quickstart")
        list(saes)  # ["layers.1", "layers.3", "layers.3.mlp"]; no head is loaded
        saes["layers.1"].encode(hidden)
        "layers.7" in saes  # False
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
        """
        The folder or repo of the heads.

        Examples:
            ```python
            from sae_accel import AutoSae

            AutoSae.from_pretrained("runs/quickstart").origin  # "runs/quickstart"
            ```
        """
        return self._repository.name

    @property
    def commit(self) -> str | None:
        """
        The commit that all heads are from; None for a folder, or if the Hub was not asked.

        Examples:
            ```python
            from sae_accel import AutoSae

            AutoSae.from_pretrained("runs/quickstart").commit  # None: a folder
            ```
        """
        return self._repository.commit

    @property
    def from_cache(self) -> str:
        """
        Why the repo may have heads that are not in this mapping, because the Hub was not asked; empty if all heads are
        known.

        Examples:
            ```python
            from sae_accel import AutoSae

            AutoSae.from_pretrained("runs/quickstart").from_cache  # "": all heads are known
            ```
        """
        return self._repository.from_cache

    def select(self, *patterns: str) -> "SaeHeads":
        """
        Returns the heads whose names match, in natural order, without loading them.

        Args:
            patterns (`str`): Globs over names, ours or another library's, or over hookpoints: `*`, `?` and `[012]`
                stay within one component, `**` crosses dots.

        Raises:
            `HeadNotFound`: if a pattern matches nothing.

        Examples:
            ```python
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("runs/quickstart")
            list(saes.select("layers.*"))  # ["layers.1", "layers.3"]
            list(saes.select("layers.[0-2]", "layers.*.mlp"))  # ["layers.1", "layers.3.mlp"]
            ```
        """
        chosen: dict[str, Place] = {}
        for pattern in patterns:
            matches = re.compile(glob_to_regex(pattern)).fullmatch
            found = [name for name in self if any(map(matches, self._names(name)))] or self._by_config(pattern)
            if not found:
                raise HeadNotFound(f"{self.origin!r} has no head that {pattern!r} matches. {self._near(pattern)}")
            chosen |= {name: self._places[name] for name in found}
        heads = SaeHeads(self._repository, chosen, self._options)
        heads._loaded = {name: head for name, head in self._loaded.items() if name in chosen}
        return heads

    def load(self, name: str) -> HeadModel:
        """
        Loads a head anew and does not keep it, so that its memory is free when you are done.

        Raises:
            `InputError`: if there is no such head, or it cannot be read.

        Examples:
            ```python
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("runs/quickstart")
            norms = {name: saes.load(name).W_dec.norm(dim=-1) for name in saes}  # one head in memory at a time
            ```
        """
        name = self._name(name)
        place = self._places[name]
        with head_errors(self._repository, name):
            check_devices(self._options.get("device_map"))
            if place.layout is None:
                # An LM has files of the same names, and its weights must not be fetched to find that out.
                self._stored_config(place)
            self._fetch(place)
            with quiet_files():
                head = load_head(place, dict(self._options))
        head.config.name_or_path = self.origin
        _complete(head.config, name, place)
        return head

    def config(self, name: str) -> HeadConfig:
        """
        Returns a head's config, without its weights.

        Raises:
            `InputError`: if there is no such head, or its config cannot be read.

        Examples:
            ```python
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("runs/quickstart")
            saes.config("layers.1").num_latents
            ```
        """
        name = self._name(name)
        place = self._places[name]
        with head_errors(self._repository, name):
            if place.layout is not None:
                self._fetch(place)
            config = self._stored_config(place)
        _complete(config, name, place)
        return config

    def files(self, name: str) -> list[str]:
        """
        Returns a head's files, as paths in the folder or repo.

        Raises:
            `InputError`: if there is no such head.

        Examples:
            ```python
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("runs/quickstart")
            saes.files("layers.1")  # ["layers.1/config.json", "layers.1/model.safetensors"]
            ```
        """
        return list(self._places[self._name(name)].files.values())

    def is_ours(self, name: str) -> bool:
        """
        Whether a head is in our own layout.

        Raises:
            `InputError`: if there is no such head.

        Examples:
            ```python
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("runs/quickstart")
            saes.is_ours("layers.1")  # True
            ```
        """
        return self._places[self._name(name)].layout is None

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Writes every head in our layout, each into its own folder: all heads, or none. It loads one head at a time.

        Args:
            save_directory (`str` or `Path`): The folder for the heads; made if it does not exist.

        Raises:
            `InputError`: if a head cannot be read.

        Examples:
            ```python
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("runs/quickstart").select("layers.1")
            saes.save_pretrained("copies")  # writes copies/layers.1
            ```
        """
        target = Path(save_directory).resolve()
        with staging_folder(target) as staging:
            for name in self:
                head = self._loaded.get(name) or self.load(name)
                with quiet_files():
                    head.save_pretrained(staging / name)
            for name in self:
                _replace_head(staging / name, target / name)

    def push_to_hub(self, repo_id: str, license: str | None = None, **kwargs: Any) -> Any:
        """
        Releases every head in our layout, in one commit, with a model card. The heads are first written to a temporary
        folder, one at a time.

        Args:
            repo_id (`str`): The repo: `name` or `user/name`.
            license (`str`, *optional*): The Hub's identifier of a license, for the card.
            kwargs (*optional*): `private`, `revision`, `token` and `message`, as in [`Release.push`].

        Returns:
            [`Pushed`].

        Raises:
            `InputError`: if a head cannot be read, the Hub refuses, or it cannot be reached.

        Examples:
            ```python { no-run }
            from sae_accel import AutoSae

            saes = AutoSae.from_pretrained("runs/quickstart")
            saes.select("layers.3", "layers.3.mlp").push_to_hub("user/smollm2-saes", license="apache-2.0")
            ```
        """
        return push_saved(self.save_pretrained, repo_id, license, **kwargs)

    def _fetch(self, place: Place) -> None:
        place.paths = {role: Path(self._repository.fetch(file)) for role, file in place.files.items()}

    def _stored_config(self, place: Place) -> HeadConfig:
        if place.layout is None:
            place.paths |= {"config": Path(self._repository.fetch(place.files["config"]))}
        return stored_config(place, self._options)

    def _names(self, ours: str) -> tuple[str, ...]:
        """Returns a head's names, as far as file names tell: ours, its own library's, and its hookpoint's."""
        hookpoint = ours.split("/")[0]
        return (ours, self._places[ours].name, hookpoint, lens_name(hookpoint) or hookpoint)

    def _name(self, name: str) -> str:
        """Returns our name of a head: from our name, its own library's, or a hookpoint with one head."""
        if name in self._places:
            return name
        for ours, place in self._places.items():
            if name == place.name:
                return ours
        at_hookpoint = [ours for ours in self._places if name in self._names(ours)] or self._by_config(name)
        if len(at_hookpoint) == 1:
            return at_hookpoint[0]
        if at_hookpoint:
            raise HeadNotFound(
                f"{self.origin!r} has several heads at {name!r}: {', '.join(at_hookpoint[:6])}. Name one."
            )
        raise HeadNotFound(f"{self.origin!r} has no head {name!r}. {self._near(name)}")

    def _by_config(self, name: str) -> list[str]:
        """Returns the heads at a hookpoint, or with a hook's name, that only their configs tell."""
        silent = [ours for ours, place in self._places.items() if place.hookpoint is None and "config" in place.files]
        found = []
        for ours in silent:
            config = self.config(ours)
            if name == config.hookpoint or name in (config.aliases or []):
                found.append(ours)
        return found

    def _near(self, name: str) -> str:
        if list(self._places) == [""]:
            return "Its only head is at the top: leave hookpoint out."
        near = [ours for inner in inner_names(name) for ours in self if inner in self._names(ours)]
        near += [ours for ours in self if ours.split("/")[0].endswith(f".{name}")]
        near = near[:4] or difflib.get_close_matches(name, self._places, n=4, cutoff=0.4) or list(self._places)[:4]
        cached = " The Hub was not asked, so only the heads in the cache are known."
        return f"Near names: {', '.join(near)}.{cached if self._repository.from_cache else ''}"

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self._name(name) in self._places
        except HeadNotFound:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        names = "\n".join(f"  {name}{' (loaded)' if name in self._loaded else ''}" for name in self)
        return f"{len(self)} heads in {self._repository.name!r}:\n{names}"


def natural_key(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts names by the value of the numbers in them: `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _complete(config: HeadConfig, name: str, place: Place) -> None:
    """Adds to a config what the names of files tell about a head's hookpoint, where its files do not."""
    if place.layout is None and config.hookpoint is None and name:
        config.hookpoint = name.split("/")[0]
    if place.layout is not None and config.hookpoint is None:
        config.hookpoint = place.hookpoint
    if place.layout is not None and place.name and place.name.split("/")[0] != config.hookpoint:
        config.aliases = list(dict.fromkeys([*(config.aliases or []), place.name]))


def _replace_head(source: Path, target: Path) -> None:
    """Moves a head's files, and removes older weights of other names, which would be read instead."""
    target.mkdir(parents=True, exist_ok=True)
    files = [path for path in source.iterdir() if path.is_file()]
    for old in {*target.glob("model*.safetensors*")} - {target / file.name for file in files}:
        old.unlink()
    for file in files:
        os.replace(file, target / file.name)

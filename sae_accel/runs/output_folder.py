"""
Who owns which file in an output folder, and whether a run may begin there.

A file belongs to a run if the folder's manifest lists it. Every other file is somebody's: it is never deleted, and a
run that would overwrite it is refused. A run may go on from a checkpoint in the folder, replace an earlier run if the
user says so, or replace an unfinished run that has the same settings and has saved nothing.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..cards.model_card import CARD, is_ours
from ..cards.plots import FREQUENCY_PLOT, FVU_PLOT
from ..common.errors import InputError
from ..common.files import in_units, remove, size_of
from ..common.manifest import Manifest
from ..common.run_files import ADAPTER, BEST, MANIFEST, METRICS, RECIPE, RUN_FILES
from ..hub.files import is_config_of_ours
from ..processes.agreement import say
from ..recipe.arguments import LoraArguments, SaeTrainingArguments
from .checkpoint import checkpoints, delete, newest_complete, put_aside, step_of
from .differences import Differences


LOGS = "logs"
# The files of a head that a run writes; and the files by which a folder counts as somebody's model.
_HEAD_FILES = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_MODEL_FILES = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?")
_LOG_FILES = re.compile(r"events\.out\.tfevents\.\d+\..*|hparams\.yml")
_PLOTS = (FVU_PLOT, FREQUENCY_PLOT)


class OutputFolder:
    """
    The output folder of a run before the run begins: files of earlier runs in it, and files of somebody else.

    Args:
        path (`Path`): The folder, which need not exist.
        places (`Iterable[str]`): The folders below it into which the run will write heads or a LoRA.
        run_name (`str`, *optional*): The run's name in its trackers; the folder's name if not given.
        tracks (`bool`, defaults to `True`): Whether the run has trackers, which write into the folder.
        writes_recipe (`bool`, defaults to `False`): Whether the run will write `recipe.yaml`.
        identity (`Mapping[str, Any]`, *optional*): The result of `identity_of`. If an unfinished run has the same
            identity, this run may replace it.
    """

    def __init__(
        self,
        path: Path,
        places: Iterable[str] = (),
        run_name: str | None = None,
        tracks: bool = True,
        writes_recipe: bool = False,
        identity: Mapping[str, Any] | None = None,
    ):
        self.path = path
        self.places = list(places)
        self.logs = [f"{LOGS}/{run_name or path.resolve().name}"] if tracks else []
        self.writes_recipe = writes_recipe
        self.identity = dict(identity or {})

    @property
    def manifest(self) -> Manifest:
        """The folder's manifest, which lists the files of earlier runs; an empty one if there is none."""
        return Manifest.read(self.path) or Manifest()

    def where_to_begin(self, resume: bool | str, overwrite: bool) -> Path | None:
        """
        Finds the checkpoint that a run goes on from; None if the run starts from the beginning.

        Args:
            resume (`bool` or `str`): A checkpoint folder; `True` is the newest complete one, if there is one.
            overwrite (`bool`): Whether a new run may delete the folder's earlier run.

        Raises:
            `InputError`: if the folder holds another run that must stay, or somebody's file where the run would write.
        """
        checkpoint = newest_complete(self.path) if resume is True else Path(resume) if resume else None
        if in_the_way := self.in_the_way(checkpoint):
            where = in_the_way[0].relative_to(self.path)
            raise InputError(
                f"Output folder {str(self.path)!r} holds {str(where)!r}, which no run of sae_accel has written, and "
                "this run would overwrite it. Move it, or set another training.output_dir."
            )
        if self._goes_on_here(checkpoint):
            return checkpoint
        left = self.leftovers()
        may_begin_anew = self._can_begin_anew() and (bool(resume) or not self._has_saved())
        if left and not overwrite and not may_begin_anew:
            raise InputError(
                f"Output folder {str(self.path)!r} holds another run ({left[0].relative_to(self.path)}). Set "
                "--training.resume_from_checkpoint true to go on with it, --training.overwrite_output_dir true to "
                "delete it, or another training.output_dir."
            )
        return checkpoint

    def begin(self, checkpoint: Path | None) -> None:
        """
        Prepares the folder for this run, and writes the run's manifest. If the run goes on from a checkpoint of the
        folder, it renames later checkpoints; otherwise it deletes the files of the earlier run. A printed line says
        so. Only the main process calls it.
        """
        own = Manifest(self.places, self._files(), self.logs, identity=self.identity)
        self.path.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None and self._goes_on_here(checkpoint):
            earlier = self.manifest
            earlier.claim(own)
            earlier.identity = self.identity
            put_aside(self.path, earlier, checkpoint)
            self._delete(self.manifest.unfinished(self.path))
            return
        if what := self.to_delete(checkpoint):
            say(f"Deleting the files of an earlier run in {str(self.path)!r}: {what}.")
            self._delete(self.leftovers())
        own.write(self.path)

    def to_delete(self, checkpoint: Path | None) -> str:
        """Names and sizes of the files that a run from `checkpoint`, or from the start if None, deletes first."""
        return "" if self._goes_on_here(checkpoint) else self._in_words(self.leftovers())

    def bytes_freed(self, checkpoint: Path | None) -> int:
        """The number of bytes that a run from `checkpoint`, or from the start if None, deletes first."""
        return 0 if self._goes_on_here(checkpoint) else sum(map(size_of, self.leftovers()))

    def bytes_held(self, checkpoint: Path | None) -> int:
        """The number of bytes of the checkpoints that a run from `checkpoint` already owns."""
        own = self.manifest.checkpoints if self._goes_on_here(checkpoint) else ()
        return sum(size_of(self.path / name) for name in own)

    def leftovers(self) -> list[Path]:
        """Lists the checkpoints and files of earlier runs."""
        manifest = self.manifest
        found = [path for name in manifest.checkpoints if _exists(path := self.path / name)]
        found += [file for place in manifest.places for file in _head_files(self.path / place)]
        found += [path for name in manifest.files if _exists(path := self.path / name) and _is_report(path)]
        if any(path.is_relative_to(self.path / BEST) for path in found):
            found += [path for name in (RECIPE, MANIFEST) if (path := self.path / BEST / name).is_file()]
        for folder in manifest.logs:
            files = sorted((self.path / folder).rglob("*"))
            found += [file for file in files if file.is_file() and _LOG_FILES.fullmatch(file.name)]
        return found + manifest.unfinished(self.path)

    def in_the_way(self, checkpoint: Path | None = None) -> list[Path]:
        """Lists somebody's files and folders that a run from `checkpoint` would overwrite."""
        manifest, step = self.manifest, 0 if checkpoint is None else step_of(checkpoint)
        own = {self.path / name for name in manifest.checkpoints} | ({checkpoint} if checkpoint else set())
        foreign = [path for path in checkpoints(self.path) if path not in own and step_of(path) > step]
        files = {*self._files(), MANIFEST} - {CARD, *manifest.files}
        foreign += [
            path for name in sorted(files) if _exists(path := self.path / name) and not self._is_manifest(path)
        ]
        left = self.leftovers()
        for place in (self.path / name for name in self.places):
            if place == self.path / BEST and place.is_dir():
                # A save replaces the whole folder, so nobody else's file may lie in it.
                files_of_best = (file for file in place.rglob("*") if not file.is_dir())
                foreign += [file for file in files_of_best if not any(file.is_relative_to(path) for path in left)]
            elif _is_taken(place) and not any(path.is_relative_to(place) for path in left):
                foreign.append(place)
        return foreign

    def _files(self) -> list[str]:
        """The names of the reports that the run will write."""
        return [name for name in (*RUN_FILES, CARD, *_PLOTS) if name != RECIPE or self.writes_recipe]

    def _is_manifest(self, path: Path) -> bool:
        return path == self.path / MANIFEST and Manifest.read(self.path) is not None

    def _goes_on_here(self, checkpoint: Path | None) -> bool:
        """Whether `checkpoint` lies in this folder."""
        return checkpoint is not None and checkpoint.absolute().parent.resolve() == self.path.resolve()

    def _can_begin_anew(self) -> bool:
        """Whether the folder's earlier run is unfinished and has the identity of this run."""
        manifest = self.manifest
        heads = [place for place in manifest.places if place.split("/")[0] != BEST and _head_files(self.path / place)]
        ended = bool(heads) or (self.path / METRICS).exists()
        return not ended and not Differences.between(manifest.identity, self.identity).refused

    def _has_saved(self) -> bool:
        """Whether the earlier run has saved heads or a checkpoint, and not only logs."""
        heads = any(_head_files(self.path / place) for place in self.manifest.places)
        return heads or newest_complete(self.path) is not None

    def _delete(self, paths: Iterable[Path]) -> None:
        """Deletes files, and folders that become empty. A link's target stays."""
        manifest = self.manifest
        for path in paths:
            if path.name in manifest.checkpoints and path.parent == self.path:
                delete(path)
                continue
            remove(path)
            for folder in path.parents:
                if folder == self.path or folder.is_symlink() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _in_words(self, paths: Iterable[Path]) -> str:
        """The names of files and folders below this folder, with the size of each, as text."""
        sizes: dict[str, int] = {}
        places = self.manifest.places
        for path in paths:
            name = path.relative_to(self.path)
            shown = str(name.parent) if str(name.parent) in places else name.parts[0]
            sizes[shown] = sizes.get(shown, 0) + size_of(path)
        named = [f"{name} ({in_units(size)})" for name, size in sizes.items()]
        rest = f" and {len(named) - 20} more ({in_units(sum([*sizes.values()][20:]))})" if len(named) > 20 else ""
        return ", ".join(named[:20]) + rest


def written_places(heads: Iterable[str], args: SaeTrainingArguments, lora: LoraArguments | None) -> list[str]:
    """
    Lists the folders, relative to the output folder, into which a run writes.

    Args:
        heads (`Iterable[str]`): The names of all heads of the run.
        args (`SaeTrainingArguments`): Whether the run also keeps the best heads (`save_best`).
        lora ([`LoraArguments`], *optional*): The LoRA that the run trains.
    """
    places = [*heads, *([] if lora is None else [ADAPTER])]
    return [*places, *([BEST, *(f"{BEST}/{place}" for place in places)] if args.save_best else [])]


def _exists(path: Path) -> bool:
    """Whether a path exists; a link without a target counts too."""
    return path.exists() or path.is_symlink()


def _is_report(path: Path) -> bool:
    """Whether a run has written a file: a model card counts only if it is generated, not if somebody wrote it."""
    return path.name != CARD or (path.is_file() and is_ours(path))


def _is_head(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and is_config_of_ours(config)


def _is_taken(place: Path) -> bool:
    """Whether a place holds a model or an adapter, or is a file."""
    if not place.is_dir():
        return _exists(place)
    files = {file.name for file in place.iterdir()}
    return "adapter_config.json" in files or any(map(_MODEL_FILES.fullmatch, files))


def _head_files(folder: Path) -> list[Path]:
    """Lists the files of a head or LoRA that a run has written; after a kill the head's config may be missing."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder] if folder.is_symlink() else []
    if folder.name == ADAPTER:
        return sorted(folder.glob("adapter_*"))
    if (folder / "config.json").exists() and not _is_head(folder):
        return []
    return sorted(file for file in folder.iterdir() if _HEAD_FILES.fullmatch(file.name))

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..cards.model_card import CARD, is_ours
from ..cards.plots import FREQUENCY_PLOT, FVU_PLOT
from ..common.errors import InputError
from ..common.run_files import ADAPTER, FREQUENCIES, METRICS, RECIPE, RUN_FILES, TRAINER_STATE
from ..hub.files import is_config_of_ours
from ..recipe.arguments import LoraArguments, SaeTrainingArguments
from .checkpoint import MANIFEST, STATE_FILE, checkpoints, newest_complete


BEST, LOGS = "best", "logs"
_HEAD_FILES = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?")
_LOG_FILES = re.compile(r"events\.out\.tfevents\..*|hparams\.yml")


class OutputFolder:
    """
    A run's folder before the run begins: what an earlier run left there, and what somebody else did.

    A file is an earlier run's if it lies where a run puts it and a checkpoint or `metrics.json` of that run names it,
    or its own content says so. Every other file is somebody's, and is never deleted.

    Args:
        path (`Path`): The folder, which need not exist.
        places (`Iterable[str]`): Folders below it into which the run will write heads, or a LoRA.
        run_name (`str`, *optional*): The run's name in its trackers, if it is not the folder's.
        writes_recipe (`bool`, defaults to `False`): Whether the run will write `recipe.yaml`.
    """

    def __init__(
        self, path: Path, places: Iterable[str] = (), run_name: str | None = None, writes_recipe: bool = False
    ):
        self.path = path
        self.places = list(places)
        self.run_name = run_name
        self.writes_recipe = writes_recipe

    def where_to_begin(self, resume: bool | str, overwrite: bool) -> Path | None:
        """
        The checkpoint that a run goes on from, or None if it starts anew.

        Args:
            resume (`bool` or `str`): A checkpoint folder; `True` is the newest whole one, if there is one.
            overwrite (`bool`): Whether a run that starts anew may delete another that the folder holds.

        Raises:
            `InputError`: if the folder holds another run that must be kept, or somebody's files where the run's own
                files would go.
        """
        checkpoint = newest_complete(self.path) if resume is True else Path(resume) if resume else None
        if checkpoint is not None:
            return checkpoint
        if in_the_way := self.in_the_way():
            where = in_the_way[0].relative_to(self.path)
            raise InputError(
                f"Output folder {str(self.path)!r} holds {str(where)!r}, which no run of sae_accel has left there, "
                "and this run would write in its place. Move it, or set another training.output_dir."
            )
        left = self.leftovers()
        if left and not overwrite:
            raise InputError(
                f"Output folder {str(self.path)!r} holds another run ({left[0].relative_to(self.path)}). Set "
                "training.resume_from_checkpoint to go on with it, training.overwrite_output_dir to delete it, or "
                "another training.output_dir."
            )
        return None

    def leftovers(self) -> list[Path]:
        """Checkpoints, and files, that an earlier run left."""
        own = [path for path in checkpoints(self.path) if _is_checkpoint(path)]
        own += [self.path / name for name in self._reports()]
        own += [file for place in self._recorded_places() for file in _head_files(self.path / place)]
        if any(file.is_relative_to(self.path / BEST) for file in own):
            own += [file for name in (RECIPE, MANIFEST) if (file := self.path / BEST / name).is_file()]
        return own + list(self._logs())

    def in_the_way(self) -> list[Path]:
        """Files and folders of somebody, in whose place the run would write."""
        foreign = [path for path in checkpoints(self.path) if not _is_checkpoint(path)]
        reports = set(self._reports())
        written = [name for name in RUN_FILES if name != RECIPE or self.writes_recipe]
        foreign += [self.path / name for name in written if (self.path / name).exists() and name not in reports]
        recorded = self._recorded_places()
        for place in (self.path / name for name in self.places if name not in recorded):
            if place.name == BEST and place.is_dir():
                # It is replaced whole, so nothing else may lie there.
                own = self.leftovers()
                foreign += [file for file in place.rglob("*") if not file.is_dir() and file not in own]
            elif _is_taken(place):
                foreign.append(place)
        return foreign

    def delete_leftovers(self) -> None:
        """Deletes what an earlier run left, and folders that are empty then. A link goes, and not what it leads to."""
        for path in self.leftovers():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                continue
            path.unlink(missing_ok=True)
            for folder in path.parents:
                if folder == self.path or folder.is_symlink() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _reports(self) -> list[str]:
        """Names of the files that tell of a run that ended here."""
        ended = "train/tokens" in self._metrics()
        found = [METRICS, TRAINER_STATE, FREQUENCIES, FVU_PLOT, FREQUENCY_PLOT] if ended else []
        found += [RECIPE] if ended or self._is_recipe_of_a_checkpoint() else []
        found += [CARD] if (self.path / CARD).is_file() and is_ours(self.path / CARD) else []
        return [name for name in found if (self.path / name).is_file()]

    def _metrics(self) -> dict[str, Any]:
        return _mapping(self.path / METRICS, json.loads)

    def _is_recipe_of_a_checkpoint(self) -> bool:
        file = self.path / RECIPE
        saved = [path / RECIPE for path in checkpoints(self.path) if _is_checkpoint(path)]
        return file.is_file() and any(one.is_file() and one.read_bytes() == file.read_bytes() for one in saved)

    def _recorded_places(self) -> list[str]:
        """Folders, below this one, of heads and a LoRA of an earlier run, by what it wrote of itself."""
        names = [key.removeprefix("train/dead/") for key in self._metrics() if key.startswith("train/dead/")]
        for manifest in (path / MANIFEST for path in checkpoints(self.path)):
            files = _mapping(manifest, json.loads).get("files")
            names += [str(PurePosixPath(file).parent) for file in files or () if file.endswith("config.json")]
        if RECIPE in self._reports() and "lora" in _mapping(self.path / RECIPE, yaml.safe_load):
            names.append(ADAPTER)
        # A head at a place that the run wants is replaced, whoever saved it there; a LoRA may be somebody's.
        names += [place for place in self.places if _is_head(self.path / place)]
        names = [name for name in dict.fromkeys(names) if _is_below(name)]
        return names + [f"{BEST}/{name}" for name in names if not name.startswith(f"{BEST}/")]

    def _logs(self) -> Iterator[Path]:
        recipe = _mapping(self.path / RECIPE, yaml.safe_load) if RECIPE in self._reports() else {}
        told = (recipe.get("training") or {}).get("run_name")
        for name in {self.run_name, told, self.path.resolve().name}:
            if name and _is_below(name):
                files = (self.path / LOGS / name).rglob("*")
                yield from sorted(file for file in files if file.is_file() and _LOG_FILES.fullmatch(file.name))


def written_places(heads: Iterable[str], args: SaeTrainingArguments, lora: LoraArguments | None) -> list[str]:
    """
    The folders, below its output folder, into which a run writes.

    Args:
        heads (`Iterable[str]`): Names of all heads of the run.
        args (`SaeTrainingArguments`): Whether it keeps the best heads as well.
        lora ([`LoraArguments`], *optional*): A LoRA that it trains.
    """
    return [*heads, *([] if lora is None else [ADAPTER]), *([BEST] if args.save_best else [])]


def _is_checkpoint(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() or "files" in _mapping(folder / MANIFEST, json.loads)


def _is_head(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and is_config_of_ours(config)


def _is_taken(place: Path) -> bool:
    """Whether a model or an adapter lies there, or something that is no folder."""
    if not place.is_dir():
        return place.exists() or place.is_symlink()
    files = {file.name for file in place.iterdir()}
    return "adapter_config.json" in files or any(map(_HEAD_FILES.fullmatch, files))


def _head_files(folder: Path) -> list[Path]:
    """The files of a head of ours, or of a LoRA."""
    if folder.is_symlink():
        return [folder]
    if folder.name == ADAPTER:
        return sorted(folder.glob("adapter_*"))
    if not _is_head(folder):
        return []
    return sorted(file for file in folder.iterdir() if _HEAD_FILES.fullmatch(file.name))


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return name not in ("", ".") and not path.is_absolute() and ".." not in path.parts


def _mapping(file: Path, parse: Any) -> dict[str, Any]:
    """A file's content; nothing if it is not there or is none of ours."""
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}

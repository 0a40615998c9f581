"""
Ends a command that meets an error.

If the user can mend the cause, such as a wrong path, the command prints one line and no traceback. If the cause is a
defect of this package, the command prints one line too, and the place of a report. The report is a file with the
command, versions, devices, recipe and traceback, so that a maintainer can find the defect. It holds no secret.
"""

import errno
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import InputError, RunEnded, is_out_of_memory, one_line
from .manifest import Manifest
from .secrets import secrets_in, secrets_in_words, without_secrets
from .signals import is_first, signals, tell


DEBUG = "--debug"
DEBUG_HELP = "show the traceback of an error here; for a defect, show the whole report here and write no file"
_PACKAGES = (
    "sae_accel torch transformers accelerate datasets huggingface_hub tokenizers safetensors peft bitsandbytes "
    "deepspeed numpy pyyaml"
).split()
# Variables about processes and devices. The values of other variables may be private.
_VARIABLES = (
    "ACCELERATE_",
    "CUDA_VISIBLE_",
    "FSDP_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "OMP_NUM_",
    "HF_HUB_OFFLINE",
)
# Errors that the machine causes, and not a defect.
_MACHINES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
# If the first process of a launch has the same error, it has written its report within these seconds.
_SAME_SECONDS = 2.0
_LONGEST = 400


class Reports:
    """
    Runs a command, and reports the error that ends it.

    Attributes:
        is_debug (`bool`): Whether reports are shown and not written.
        folder (`Path`, *optional*): The run's folder. A report is written there once the run has written to it.
        settings (`Mapping[str, Any]`, *optional*): The recipe of the run, without its secrets.
        secrets (`list[str]`): Texts that must not be in a report.
        memory_advice (`str`): Advice for a command that runs out of memory.
        is_left_to_first (`bool`): Whether only the first process of the launch prints the reason.
    """

    def __init__(self) -> None:
        self._begin([])

    def _begin(self, words: Sequence[str], name: str = "") -> None:
        self.is_debug = DEBUG in words
        self.folder: Path | None = None
        self.settings: Mapping[str, Any] | None = None
        self.secrets = list(secrets_in_words(words))
        self.memory_advice = ""
        self.is_left_to_first = False
        self._command = " ".join(["sae-accel", name, *words])
        self._told: tuple[BaseException, str] | None = None

    def command(self, name: str, words: Sequence[str], work: Callable[[list[str]], int]) -> int:
        """
        Runs a command and returns its status. After an error it prints one line, and the status is 2 if the input
        cannot be used, and 1 if the command cannot go on.

        Args:
            name (`str`): Name of the command.
            words (`Sequence[str]`): The words after the name. `--debug` may stand anywhere.
            work (`Callable[[list[str]], int]`): The command, which takes the words without `--debug`.
        """
        self._begin(words, name)
        try:
            return work([word for word in words if word != DEBUG])
        except (InputError, RunEnded) as error:
            if self.is_debug and is_first():
                traceback.print_exception(error)
            tell(error)
            return 2 if isinstance(error, InputError) else 1
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                tell(f"{str(error.filename)[:_LONGEST]!r} cannot be used: {error.strerror}.")
                return 2
            line = self.line(error)
            if not self.is_left_to_first and (is_first() or not self._first_has_it()):
                saved = f" {signals.words()}" if signals.is_active else ""
                tell(f"{line}{saved}", by_any=True)
            return 1

    def know(self, settings: Mapping[str, Any], folder: Path, whole: Mapping[str, Any]) -> None:
        """
        Stores the settings of a run, for a report.

        Args:
            settings (`Mapping[str, Any]`): The recipe without its secrets.
            folder (`Path`): The run's output folder.
            whole (`Mapping[str, Any]`): The recipe with its secrets, which a report must not show.
        """
        self.settings, self.folder = settings, folder
        self.secrets += secrets_in(whole)

    def line(self, error: BaseException) -> str:
        """One line about an unexpected error. The first call for an error also writes or shows a report."""
        if self._told is None or self._told[0] is not error:
            self._told = (error, self._line(error))
        return self._told[1]

    def _line(self, error: BaseException) -> str:
        reason = without_secrets(_in_words(error), self.secrets)
        if is_out_of_memory(error):
            if self.is_debug:
                self._show(error)
            return f"There is not enough memory ({reason}). {self.memory_advice}".rstrip()
        if self.is_debug:
            self._show(error)
            return f"{reason}. This is a defect of sae_accel; the report is above."
        if isinstance(error, OSError) and error.errno in _MACHINES and error.filename is not None:
            return f"{str(error.filename)!r} cannot be used: {error.strerror}. {DEBUG} shows which step needed it."
        path = self._write(error)
        if path is None:
            self._show(error)
            return f"{reason}. This is a defect of sae_accel; the report is above, since no folder can be written to."
        return f"{reason}. This is a defect of sae_accel; a report is in {str(path)!r}, and {DEBUG} shows it here."

    def _show(self, error: BaseException) -> None:
        print(self.text(error), file=sys.stderr)

    def _write(self, error: BaseException) -> Path | None:
        """Writes the report and returns its path; None if no folder can be written to."""
        name = f"sae_accel-error-{datetime.now():%Y%m%d-%H%M%S-%f}-{_launch()}-process-{_rank()}.txt"
        for folder in self._folders():
            with suppress(OSError):
                # Mode x overwrites no file and follows no link that somebody put there.
                with open(folder / name, "x", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(self.text(error))
                return folder / name
        return None

    def _folders(self) -> Iterator[Path]:
        """Yields folders for a report. The temporary folder comes last, since it may vanish with the job."""
        if self.folder is not None and Manifest.read(self.folder) is not None:
            yield self.folder
        yield Path(".")
        yield Path(tempfile.gettempdir())

    def _first_has_it(self) -> bool:
        """Whether the first process on this machine has an error too, and so prints the reason."""
        if self.is_debug:
            return False
        deadline = time.monotonic() + _SAME_SECONDS
        while time.monotonic() < deadline:
            name = f"sae_accel-error-*-{_launch()}-process-0.txt"
            if any(any(folder.glob(name)) for folder in self._folders()):
                return True
            time.sleep(0.1)
        return False

    def text(self, error: BaseException) -> str:
        """A report, without secrets."""
        parts = {
            "Command": self._command,
            "Versions": "\n".join(_versions()),
            "Devices": "\n".join(_devices()),
            "Environment": "\n".join(_environment()),
            "Recipe": self._recipe(),
            "Error": "".join(traceback.format_exception(error)).rstrip(),
        }
        text = "\n\n".join(f"{title}\n{'-' * len(title)}\n{part}" for title, part in parts.items() if part)
        return without_secrets(f"{text}\n", self.secrets)

    def _recipe(self) -> str:
        if self.settings is None:
            return ""
        import yaml

        return yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True).rstrip()


def _in_words(error: BaseException) -> str:
    """The type of an error, and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    first = one_line(lines[0])[:_LONGEST].rstrip(".:")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def _devices() -> Iterator[str]:
    yield f"{os.cpu_count()} CPUs"
    torch = sys.modules.get("torch")
    if torch is None:
        return
    # The report may be about a broken device, which raises here.
    with suppress(RuntimeError, AssertionError):
        for index in range(torch.cuda.device_count()):
            yield f"cuda:{index} {torch.cuda.get_device_name(index)}"


def _environment() -> Iterator[str]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES):
            yield f"{name}={value}"


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _launch() -> int:
    """A number that the processes of one launch on one machine share, and no other process has at that time."""
    return os.getppid() if "RANK" in os.environ else os.getpid()


reports = Reports()

import re
from collections.abc import Iterator
from pathlib import PurePosixPath


# Files that a run leaves at the top of its folder, and that a release contains.
TRAINER_STATE = "trainer_state.json"
HISTORY = "log_history.jsonl"
FREQUENCIES = "latent_frequency.safetensors"
RECIPE, METRICS = "recipe.yaml", "metrics.json"
RUN_FILES = (RECIPE, METRICS, TRAINER_STATE, HISTORY, FREQUENCIES)
# The list of the files in a checkpoint, or of the files that a run owns in its folder.
MANIFEST = "manifest.json"
# The folder of the best heads.
BEST = "best"
# The folder of a LoRA that was trained around heads.
ADAPTER = "adapter"
# Folders of a run that are not its heads.
NOT_HEADS = re.compile(r"(checkpoint-\d+(\.before-.*)?|last-checkpoint|best|logs|plots|adapter|\..*)")


def folders_of(files: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each folder that may hold a head, with its files' names and paths. The top folder's name is empty."""
    folders: dict[str, dict[str, str]] = {}
    for path in map(PurePosixPath, files):
        if not any(NOT_HEADS.fullmatch(part) for part in path.parts[:-1]):
            folder = "" if path.parent == PurePosixPath(".") else str(path.parent)
            folders.setdefault(folder, {})[path.name] = str(path)
    yield from folders.items()

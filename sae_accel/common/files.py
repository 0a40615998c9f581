import json
import os
import shutil
from pathlib import Path
from typing import Any


def remove(path: Path) -> None:
    """Deletes a file, a folder with all that is in it, or a link, but not what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; of a link none, as it goes without what it leads to."""
    if path.is_symlink() or not path.exists():
        return 0
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def free_bytes(path: Path) -> int:
    """What is free on the disk on which a file or folder lies, or will lie."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.is_dir())).free


def in_units(size: float) -> str:
    """Bytes in words, such as `1.2 GB` of 10^9 bytes."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is complete or as it was before, whenever the process or the machine ends."""
    staging = path.with_name(f".{path.name}.partial")
    with open(staging, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def read_json(path: Path) -> dict[str, Any]:
    """A file's content; nothing if it is not there or holds something else than a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import Tensor


def remove(path: Path) -> None:
    """Deletes a file, a folder with its content, or a link. The target of a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder. A link counts as 0, since deleting it frees nothing else."""
    if path.is_symlink() or not path.exists():
        return 0
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of a file or folder, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.is_dir())).free


def in_units(size: float) -> str:
    """A number of bytes as text, such as `1.2 GB`, where 1 GB is 10^9 bytes."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file. If the process or machine stops meanwhile, the file is the old or the new one, but whole."""
    staging = path.with_name(f".{path.name}.partial")
    with open(staging, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Writes a safetensors file whose mode is that of any new file; safetensors alone lets only the owner read it."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if there is no file, or it holds no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

"""
Reads single tensors from a file without holding the whole file in memory.

A head of 10 GB must load on a machine with little more memory than that. So a tensor that needs no change is mapped
from its file, and a tensor that must be transposed or scaled is copied in pieces of 8 MB. Three formats have the same
interface: safetensors, numpy's `.npz`, and files that torch saved. Nothing in them is ever run as code.
"""

import errno
import pickle
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import InputError, one_line


# Bytes of a piece: a tensor that is transposed or scaled has this much in memory twice.
_PIECE_BYTES = 8 * 2**20
# The errors of readers for bytes that are missing or have changed.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, SafetensorError)


def open_tensors(path: str | Path) -> "TensorFile":
    """
    Opens a file of tensors: safetensors, numpy's `.npz`, or a file that torch saved.

    Raises:
        `InputError`: if the file is damaged, or holds anything but tensors and plain values, such as objects that run
            code.
    """
    kinds = {".safetensors": SafetensorsFile, ".npz": NumpyFile}
    return kinds.get(Path(path).suffix, TorchFile)(Path(path))


class TensorFile(ABC):
    """
    The tensors of a file, by name. Only the tensor that is asked for is read.

    Args:
        path (`Path`): The file.

    Attributes:
        shapes (`dict[str, tuple[int, ...]]`): The shape of each tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def whole(self, name: str) -> Tensor:
        """Returns a tensor as it is in the file, mapped if the format allows it."""

    @abstractmethod
    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields a tensor's rows, some at a time."""

    def matrix(self, name: str, transposed: bool = False, factor: float = 1.0) -> Tensor:
        """
        Returns a copy of a matrix, transposed and multiplied on request. Only a piece of the stored matrix is in
        memory beside the copy.
        """
        shape, start = self.shapes[name], 0
        out: Tensor | None = None
        for rows in self.pieces(name):
            if out is None:
                # Shape (rows, columns), or (columns, rows) if transposed.
                out = torch.empty(shape[::-1] if transposed else shape, dtype=rows.dtype)
            stop = start + len(rows)
            part = out[:, start:stop] if transposed else out[start:stop]
            part.copy_(rows.t() if transposed else rows)
            start = stop
        if out is None:
            return torch.empty(shape[::-1] if transposed else shape)
        return out if factor == 1.0 else out.mul_(factor)

    def _bounds(self, name: str, itemsize: int) -> Iterator[tuple[int, int]]:
        rows, *rest = self.shapes[name]
        step = max(1, _PIECE_BYTES // (itemsize * max(1, int(np.prod(rest)))))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


class SafetensorsFile(TensorFile):
    """The tensors of a safetensors file."""

    def __init__(self, path: Path):
        super().__init__(path)
        with _telling_damage(path), safe_open(path, framework="pt") as file:
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    def whole(self, name: str) -> Tensor:
        """Returns a tensor, mapped from the file."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields a tensor's rows, each piece through its own mapping, so that the pages that were read are freed."""
        for start, stop in self._bounds(name, 4):
            with safe_open(self.path, framework="pt") as file:
                yield file.get_slice(name)[start:stop]


class NumpyFile(TensorFile):
    """The arrays of a `.npz` file."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._dtypes: dict[str, np.dtype] = {}
        self._by_columns: set[str] = set()
        with _telling_damage(path), zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    name = member.removesuffix(".npy")
                    self.shapes[name], self._dtypes[name], by_columns = _npy_header(file)
                    if by_columns and len(self.shapes[name]) > 1:
                        self._by_columns.add(name)

    def whole(self, name: str) -> Tensor:
        """Returns an array, read from the archive into memory."""
        return (
            self.matrix(name)
            if len(self.shapes[name]) == 2
            else torch.cat([*map(torch.atleast_1d, self.pieces(name))])
        )

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields an array's rows in the order in which they come out of the archive."""
        shape, dtype = self.shapes[name], self._dtypes[name]
        if not shape or name in self._by_columns:
            # An array that is stored by columns cannot be read row by row.
            with _telling_damage(self.path), np.load(self.path, allow_pickle=False) as arrays:
                whole = np.ascontiguousarray(arrays[name]).reshape(shape)
            yield _tensor(whole)
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            _npy_header(file)
            for start, stop in self._bounds(name, dtype.itemsize):
                rows = (stop - start, *shape[1:])
                with _telling_damage(self.path):
                    content = bytearray(file.read(int(np.prod(rows)) * dtype.itemsize))
                    part = np.frombuffer(content, dtype).reshape(rows)
                yield _tensor(part)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind not in "fiu":
        raise InputError(f"The .npz file holds an array of {dtype}; only numbers can be read.")
    return shape, dtype, fortran


class TorchFile(TensorFile):
    """
    The tensors of a file that `torch.save` wrote: one dictionary of tensors and plain values. It is always unpickled
    with `weights_only=True`.

    Attributes:
        values (`dict[str, Any]`): The entries that are not tensors.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        with _telling_damage(path), path.open("rb") as file:
            self._can_map = zipfile.is_zipfile(path)
            if file.read(4) == b"PK\3\4" and not self._can_map:
                raise _damaged(path, "its end is missing")
        self._is_checked = not self._can_map
        content = self._load()
        self.shapes = {name: tuple(value.shape) for name, value in content.items() if isinstance(value, Tensor)}
        self.values = {name: value for name, value in content.items() if not isinstance(value, Tensor)}

    def whole(self, name: str) -> Tensor:
        """Returns a tensor, mapped if the file is from torch 1.6 or later."""
        self._check()
        return self._load()[name].detach()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields a tensor's rows, each piece through its own mapping, so that the pages that were read are freed."""
        if not self._can_map:
            # A file from before torch 1.6 is always read as a whole.
            yield self.whole(name)
            return
        self._check()
        for start, stop in self._bounds(name, 4):
            yield self._load()[name].detach()[start:stop]

    def _check(self) -> None:
        """Compares the file once with its checksums, which torch writes but never checks."""
        if self._is_checked:
            return
        with _telling_damage(self.path), zipfile.ZipFile(self.path) as archive:
            # A checksum is 0 if torch was told not to compute it.
            for record in (record for record in archive.infolist() if record.CRC):
                with archive.open(record) as file:
                    while file.read(_PIECE_BYTES):
                        pass
        self._is_checked = True

    def _load(self) -> dict[str, Any]:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._can_map)
        except (pickle.UnpicklingError, EOFError, LookupError) as error:
            raise InputError(
                f"{str(self.path)!r} does not hold only tensors: it is damaged, or holds objects that could run code "
                "when they are read. It was not read further."
            ) from error
        except (RuntimeError, struct.error) as error:
            raise _damaged(self.path, error) from error
        if not isinstance(content, dict):
            raise InputError(
                f"{str(self.path)!r} holds a {type(content).__name__}; only a dictionary of tensors can be read."
            )
        return content


@contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (*_DAMAGE, OSError) as error:
        # A damaged directory of an archive can point before the file's beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> InputError:
    words = one_line(reason).rstrip(".")
    return InputError(f"{str(path)!r} is damaged ({words}). Fetch it again, from the Hub with force_download=True.")

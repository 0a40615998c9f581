"""What the readers of other libraries' files have in common."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import InputError
from ..models.configuration_head import HeadConfig
from ..models.configuration_sae import SaeConfig
from ..models.configuration_transcoder import TranscoderConfig
from .place import Place
from .tensor_file import TensorFile


class ForeignHead(NamedTuple):
    """
    A head of another library.

    Args:
        config (`HeadConfig`): What it is, in our words.
        read (`Callable`): Gives its tensors by our names.
    """

    config: HeadConfig
    read: Callable[[], dict[str, Tensor]]


class Source(NamedTuple):
    """
    Where one of our tensors comes from.

    Args:
        name (`str`): Its name in the file.
        transposed (`bool`): Whether the file has it transposed.
        factor (`float`): What it is multiplied by.
        copied (`bool`): Whether it is to be changed in place, so that it must not be mapped from its file.
    """

    name: str
    transposed: bool = False
    factor: float = 1.0
    copied: bool = False

    @property
    def as_it_is(self) -> bool:
        """Whether the file's own bytes do."""
        return not (self.transposed or self.copied) and self.factor == 1.0


def foreign_head(
    file: TensorFile,
    sources: Mapping[str, Source | Tensor],
    place: Place,
    *,
    transcoder: bool = False,
    declared: dict[str, int | None] | None = None,
    finish: Callable[[dict[str, Tensor]], None] | None = None,
    **fields: Any,
) -> ForeignHead:
    """
    A head whose widths are those of its tensors.

    Args:
        file ([`TensorFile`]): Its weights.
        sources (`dict[str, Source | torch.Tensor]`): By our name, where a tensor comes from, or the tensor.
        place ([`Place`]): Where it lies.
        transcoder (`bool`, defaults to `False`): Whether it predicts another activation than it reads.
        declared (`dict[str, int | None]`, *optional*): Widths by the head's own configuration, to be compared.
        finish (`Callable`, *optional*): Changes the tensors, which are then this process's own, in place.
        fields (*optional*): Of the config.

    Raises:
        `InputError`: if a tensor is missing, or shapes disagree.
    """
    skips = "W_skip" in sources
    if place.given.get("encoder_only") and finish is None:
        sources = {name: source for name, source in sources.items() if name not in ("W_dec", "W_skip")}
    shapes = {name: _shape(file, source) for name, source in sources.items()}
    for name, dimensions in {"encoder.weight": 2, "W_dec": 2, "b_dec": 1}.items():
        if len(shapes.get(name, [0] * dimensions)) != dimensions:
            stored = getattr(sources[name], "name", name)
            found = f"{stored} of {str(file.path)!r} has shape {file.shapes[stored]}"
            raise InputError(f"{found}, where a {dimensions}-dimensional tensor is read. Fetch the file again.")
    num_latents, d_in = shapes["encoder.weight"]
    d_out = shapes["W_dec"][1] if "W_dec" in shapes else shapes["b_dec"][0]
    for name, expected in {"d_in": d_in, "num_latents": num_latents, "d_out": d_out}.items():
        told = (declared or {}).get(name)
        if told is not None and told != expected:
            of_type = "" if isinstance(told, int) else f", a {type(told).__name__}"
            raise InputError(f"its configuration says {name} = {told!r}{of_type}, but its weights have {expected}.")
    _check_shapes(shapes, num_latents, d_in, d_out)
    kind: type[HeadConfig] = TranscoderConfig if transcoder else SaeConfig
    own = {"d_out": d_out, "skip_connection": skips} if transcoder else {}
    fields = {"d_in": d_in, "num_latents": num_latents, "normalize_decoder": False, **own, **fields}
    if "input_scale" in place.given:
        raise InputError("input_scale was given, but its inputs are not multiplied by a number that is unknown.")
    config = kind(**fields | place.given)

    def read() -> dict[str, Tensor]:
        # What is copied comes first, so that its file's pages are let go of before others are mapped.
        order = sorted(sources, key=lambda name: getattr(sources[name], "as_it_is", True))
        tensors = {name: _take(file, sources[name]) for name in order}
        if finish is not None:
            finish(tensors)
        return tensors

    return ForeignHead(config, read)


def last_part(origin: str) -> str:
    """The name of a folder or repo without what it lies in."""
    return origin.rstrip("/").split("/")[-1]


def names_in(file: TensorFile) -> str:
    """Some of the names of a file's tensors, for a message."""
    names = sorted(file.shapes)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "none"


def require(file: TensorFile, *names: str) -> None:
    """
    Checks that tensors are there.

    Raises:
        `InputError`: if one is missing.
    """
    for name in names:
        if name not in file.shapes:
            raise InputError(f"{str(file.path)!r} has no tensor {name!r}; it holds {names_in(file)}.")


def number_in(name: str, pattern: str) -> int | None:
    """The number that the group of a pattern finds in a name."""
    match = re.search(pattern, name)
    return int(match[1]) if match else None


def full(value: float | Tensor, num_latents: int) -> Tensor:
    """One number for every latent; numbers by latent as they are."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return value
    return torch.full((num_latents,), float(value))


def weigh_by_norms(tensors: dict[str, Tensor]) -> None:
    """
    Brings the decoder's rows to norm 1 and gives their norms to the encoder, in place: for heads whose latents
    compete, or are gated, by what they add to the reconstruction, which stays the same.
    """
    norms = tensors["W_dec"].norm(dim=-1).clamp_min(1e-8)
    tensors["W_dec"].div_(norms[:, None])
    tensors["encoder.weight"].mul_(norms[:, None])
    tensors["encoder.bias"].mul_(norms)


def _shape(file: TensorFile, source: Source | Tensor) -> tuple[int, ...]:
    if isinstance(source, Tensor):
        return tuple(source.shape)
    require(file, source.name)
    shape = file.shapes[source.name]
    return shape[::-1] if source.transposed else shape


def _check_shapes(shapes: dict[str, tuple[int, ...]], num_latents: int, d_in: int, d_out: int) -> None:
    expected = {
        "encoder.bias": (num_latents,),
        "W_dec": (num_latents, d_out),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
    }
    for name, shape in shapes.items():
        wanted = expected.get(name, (num_latents, d_in) if name == "encoder.weight" else (num_latents,))
        if shape != wanted:
            raise InputError(f"{name} has shape {shape}, but by the other tensors it should be {wanted}.")


def _take(file: TensorFile, source: Source | Tensor) -> Tensor:
    if isinstance(source, Tensor):
        return source
    if len(file.shapes[source.name]) == 2:
        return (
            file.whole(source.name) if source.as_it_is else file.matrix(source.name, source.transposed, source.factor)
        )
    tensor = file.whole(source.name)
    return tensor if source.as_it_is else tensor * source.factor

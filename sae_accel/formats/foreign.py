"""
The parts that the readers of all other libraries share.

A reader says for each of our tensors where it comes from (`Source`): the name in the file, whether it is stored
transposed, and a factor. From the shapes alone, `foreign_head` finds the widths, checks that they agree, and builds
the config. The tensors are read later, when the head is loaded, and a tensor that needs no change stays mapped from
its file, so that the head is never in memory twice.
"""

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
        config (`HeadConfig`): The head's config, in our words.
        read (`Callable`): Reads the head's tensors, under our names.
    """

    config: HeadConfig
    read: Callable[[], dict[str, Tensor]]


class Source(NamedTuple):
    """
    The place that one of our tensors is read from.

    Args:
        name (`str`): The name of the tensor in the file.
        transposed (`bool`): Whether the file stores it transposed.
        factor (`float`): The number that it is multiplied by.
        copied (`bool`): Whether it will be changed in place, so that it must not be mapped from the file.
    """

    name: str
    transposed: bool = False
    factor: float = 1.0
    copied: bool = False

    @property
    def as_it_is(self) -> bool:
        """Whether the tensor can be used exactly as it is in the file."""
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
    Builds a head of another library. Its widths are the widths of its tensors.

    Args:
        file ([`TensorFile`]): The head's weights.
        sources (`dict[str, Source | torch.Tensor]`): For each of our names, the place that the tensor is read from, or
            the tensor.
        place ([`Place`]): The head's files.
        transcoder (`bool`, defaults to `False`): Whether the head predicts another activation than the one that it
            reads.
        declared (`dict[str, int | None]`, *optional*): Widths in the head's configuration, which must agree with its
            tensors.
        finish (`Callable`, *optional*): Changes the tensors in place after they are read; they are copies then.
        fields (*optional*): Fields of the config.

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
        raise InputError("input_scale was given, but no scale of its inputs is missing. Leave input_scale out.")
    config = kind(**fields | place.given)

    def read() -> dict[str, Tensor]:
        # Copies come first, so that the pages of their file are freed before other tensors are mapped.
        order = sorted(sources, key=lambda name: getattr(sources[name], "as_it_is", True))
        tensors = {name: _take(file, sources[name]) for name in order}
        if finish is not None:
            finish(tensors)
        return tensors

    return ForeignHead(config, read)


def last_part(origin: str) -> str:
    """Returns the name of a folder or repo without the folders or user before it."""
    return origin.rstrip("/").split("/")[-1]


def names_in(file: TensorFile) -> str:
    """Returns some names of a file's tensors, for an error."""
    names = sorted(file.shapes)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") or "none"


def require(file: TensorFile, *names: str) -> None:
    """
    Checks that a file has these tensors.

    Raises:
        `InputError`: if one is missing.
    """
    for name in names:
        if name not in file.shapes:
            raise InputError(f"{str(file.path)!r} has no tensor {name!r}; it holds {names_in(file)}.")


def number_in(name: str, pattern: str) -> int | None:
    """Returns the number that the group of a pattern matches in a name; None if nothing matches."""
    match = re.search(pattern, name)
    return int(match[1]) if match else None


def full(value: float | Tensor, num_latents: int) -> Tensor:
    """Returns one number per latent, `(num_latents,)`: the same for all, or the given vector."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return value
    return torch.full((num_latents,), float(value))


def weigh_by_norms(tensors: dict[str, Tensor]) -> None:
    """
    Scales the decoder's rows to norm 1 and multiplies the encoder by their old norms, in place.

    Some libraries weigh a latent by the norm of its decoder row before they select or gate it. After this change our
    heads select the same latents, and the reconstruction stays the same.
    """
    norms = tensors["W_dec"].norm(dim=-1).clamp_min(1e-8)  # (num_latents,)
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
            raise InputError(f"{name} has shape {shape}, but the other tensors need {wanted}.")


def _take(file: TensorFile, source: Source | Tensor) -> Tensor:
    if isinstance(source, Tensor):
        return source
    if len(file.shapes[source.name]) == 2:
        return (
            file.whole(source.name) if source.as_it_is else file.matrix(source.name, source.transposed, source.factor)
        )
    tensor = file.whole(source.name)
    return tensor if source.as_it_is else tensor * source.factor

"""
Converts heads from any layout that can be read to ours, sparsify's or SAELens's.

All heads are checked and written into a temporary folder first, and then the folder is moved to its place, so that a
conversion writes all heads or none.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.errors import InputError
from ..common.quiet import quiet_files
from ..common.staging import staging_folder
from ..formats import sae_lens, sparsify
from ..models import HeadConfig, HeadModel
from ..ops.finite import first_non_finite
from .auto import AutoSae


def convert(
    source: str, target: str | Path, to: str, include: Sequence[str] = (), **told: Any
) -> list[tuple[str, HeadConfig]]:
    """
    Converts heads to another layout: all of them, or none if one cannot be converted.

    Args:
        source (`str`): A folder, a file, or a repo on the Hub.
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        to (`str`): `"sparsify"`, `"saelens"`, or `"sae_accel"` for our own layout.
        include (`Sequence[str]`): Globs over the names of heads; all heads if not given.
        told (*optional*): Other arguments of [`AutoSae.from_pretrained`], such as `input_scale`.

    Returns:
        `list[tuple[str, HeadConfig]]`: the name of each head, which is its folder in `target`, and its config.

    Raises:
        `InputError`: if a head cannot be read, holds NaN or infinity, or does not exist in the new layout. Nothing is
            written in this case.

    Examples:
        ```python
        from sae_accel.loading.convert import convert

        written = convert("runs/quickstart", "for-saelens", to="saelens", include=["layers.1"])
        [name for name, config in written]  # ["layers.1"]
        ```
    """
    if to not in WRITERS:
        raise InputError(f"--to is {to!r}; allowed are {', '.join(WRITERS)}.")
    target = Path(target).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{str(target)!r} is there already. Give a new or an empty folder.")
    heads = AutoSae.open(source, **told)
    if heads.from_cache and not (include and all(name in heads for name in include)):
        raise InputError(
            f"{source!r} may have heads that are not in the cache: {heads.from_cache}. Try again with the Hub, or "
            f"choose heads in the cache with --include: {', '.join(heads)}."
        )
    heads = heads.select(*include) if include else heads
    check, write = WRITERS[to]
    configs = {name: heads.config(name) for name in heads}
    for name, config in configs.items():
        try:
            if config.encoder_only and to != "sae_accel":
                raise InputError("it was saved without its decoder.")
            check(config)
        except InputError as error:
            raise InputError(f"Head {name!r} of {source!r} cannot be written for {to}: {error}") from error
    try:
        with staging_folder(target) as staging:
            for name in heads:
                head = heads.load(name)
                if words := first_non_finite(head.state_dict().items()):
                    raise InputError(f"Head {name!r} of {source!r} cannot be converted: {words}.")
                write(staging / name, head.config, head)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging, target)
    except OSError as error:
        raise InputError(f"{str(target)!r} cannot be written: {error}") from error
    return list(configs.items())


def _from_tensors(
    write: Callable[[Path, HeadConfig, dict[str, Tensor]], None],
) -> Callable[[Path, HeadConfig, HeadModel], None]:
    return lambda folder, config, head: write(folder, config, head.state_dict())


def _write_ours(folder: Path, config: HeadConfig, head: HeadModel) -> None:
    with quiet_files():
        head.save_pretrained(folder)


# For each layout, a function that raises if the layout has no such head, and a function that writes the head.
WRITERS = {
    "sparsify": (sparsify.config_of, _from_tensors(sparsify.write_head)),
    "saelens": (sae_lens.config_of, _from_tensors(sae_lens.write_head)),
    "sae_accel": (lambda config: None, _write_ours),
}

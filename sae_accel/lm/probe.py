from collections import Counter
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..common.errors import InputError, one_line
from .hooks import Site, record, token_model


# Sequences and tokens of the two passes. Odd numbers, that no width is likely to be; enough tokens for every expert.
PROBES = ((2, 31), (3, 37))


class ProbeFailed(InputError):
    """The LM could not be run: for want of values on the meta device, or because it does not read tokens or images."""


def probe(base_model: PreTrainedModel, sites: list[Site]) -> dict[Site, tuple[Site, int]]:
    """
    Width of the activation at each site, by two short forward passes, which may be on the meta device.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): What to look at.

    Returns:
        `dict[Site, tuple[Site, int]]`: for each site its width, and the site itself, which has `within` if its module
        may run any number of times.

    Raises:
        `InputError`: if a site is not reached, has no tensor, or what it has is not one activation for each token.
        [`ProbeFailed`]: if the LM cannot be run.
    """
    runs = [_Run(base_model, sites, *size) for size in PROBES]
    return {site: _judge(base_model, site, runs) for site in sites}


class _Run:
    """
    What a forward pass did at each site.

    Attributes:
        shapes (`dict[Site, list[torch.Size]]`): Of the activations, in the order in which they came.
        once_around (`dict[Site, set[str]]`): Modules around it that ran once, and within which all of it happened.
    """

    @torch.no_grad()
    def __init__(self, base_model: PreTrainedModel, sites: list[Site], rows: int, ctx_len: int):
        self.shapes: dict[Site, list[torch.Size]] = {site: [] for site in sites}
        self.once_around = {site: set(_around(site.module)) for site in sites}
        calls: Counter[str] = Counter()
        open_now: set[str] = set()

        def note(site: Site, tensor: Tensor) -> None:
            self.shapes[site].append(tensor.shape)
            self.once_around[site] &= open_now

        def enter(name: str) -> None:
            calls[name] += 1
            open_now.add(name)

        with ExitStack() as stack:
            for name in {around for site in sites for around in _around(site.module)}:
                module = base_model.get_submodule(name)
                hooks = (
                    module.register_forward_pre_hook(lambda *_, name=name: enter(name)),
                    module.register_forward_hook(lambda *_, name=name: open_now.discard(name)),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
            stack.enter_context(record(base_model, sites, note))
            run_on_tokens(base_model, rows, ctx_len)
        for around in self.once_around.values():
            around &= {name for name, count in calls.items() if count == 1}


def run_on_tokens(base_model: PreTrainedModel, rows: int, ctx_len: int) -> None:
    """
    Runs an LM, which may be on the meta device, on some tokens, or images.

    Raises:
        [`ProbeFailed`]: if it cannot be run.
    """
    try:
        token_model(base_model)(**_inputs(base_model, rows, ctx_len))
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        reason = one_line(error)
        raise ProbeFailed(f"{type(base_model).__name__} cannot be run to find its hookpoints: {reason}") from error


def _inputs(base_model: PreTrainedModel, rows: int, ctx_len: int) -> dict[str, Any]:
    device = next(base_model.parameters()).device
    if device.type == "meta" and any(hasattr(module, "_hf_hook") for module in base_model.modules()):
        # Accelerate reads in what lies on disk as it runs, and brings the inputs there.
        device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    if base_model.main_input_name == "pixel_values":
        config = base_model.config
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        images = torch.randn(rows, config.num_channels, *size, generator=generator)
        return {"pixel_values": images.to(device, base_model.dtype)}
    vocab_size = cast(nn.Embedding, base_model.get_input_embeddings()).num_embeddings
    return {"input_ids": torch.randint(vocab_size, (rows, ctx_len), generator=generator).to(device)}


def _judge(base_model: PreTrainedModel, site: Site, runs: list[_Run]) -> tuple[Site, int]:
    shapes = [run.shapes[site] for run in runs]
    if not any(shapes):
        raise InputError(
            f"Module {site.module!r} is not run in a forward pass of {type(base_model).__name__}. Choose another "
            "hookpoint."
        )
    width = (shapes[0] or shapes[1])[0][-1]
    if all(shape[-1] == width for run in shapes for shape in run):
        if all(len(run) == 1 for run in shapes) and all(
            _by_token(base_model, run[0], *size) for run, size in zip(shapes, PROBES, strict=True)
        ):
            return site, width
        once = set.intersection(*(run.once_around[site] for run in runs))
        if _any_number(base_model, shapes) and once:
            return site._replace(within=max(once, key=len)), width
    raise InputError(
        f"The {site.side} of module {site.module!r} is not one activation for each token: for {PROBES[0][0]} "
        f"sequences of {PROBES[0][1]} tokens it has shape {tuple((shapes[0] or shapes[1])[0])}. Choose another "
        "hookpoint."
    )


def _by_token(base_model: PreTrainedModel, shape: torch.Size, rows: int, ctx_len: int) -> bool:
    if base_model.main_input_name == "pixel_values":
        return len(shape) == 3 and shape[0] == rows
    return shape[:-1] in ((rows, ctx_len), (rows * ctx_len,))


def _any_number(base_model: PreTrainedModel, shapes: list[list[torch.Size]]) -> bool:
    """Whether a module runs on whole batches several times, as a shared layer does, or on tokens that were picked."""
    whole = all(_by_token(base_model, shape, *size) for run, size in zip(shapes, PROBES, strict=True) for shape in run)
    flat = all(len(shape) == 2 for run in shapes for shape in run)
    # A pooler has one row a sequence, positions have one row a place in the sequence.
    fixed = any(
        all(len(run) == 1 and run[0][0] == size[i] for run, size in zip(shapes, PROBES, strict=True)) for i in (0, 1)
    )
    return whole or (flat and not fixed)


def _around(name: str) -> list[str]:
    """The modules around a module, innermost first, the base model (with no name) last."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]

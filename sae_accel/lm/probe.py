"""
Finds the shape of an LM's activations before anything trains.

Two short forward passes of different sizes show which dimensions of an activation follow the number of sequences and
tokens, and which is the width. They also show a module that gives no activation per token, so that a head on it is
refused, and a module that runs several times, such as an expert. On the meta device the passes compute nothing.
"""

from collections import Counter
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..common.errors import InputError, one_line
from .hooks import Site, record, token_model


# Sequences and tokens of the two passes: odd numbers, which are rarely a width, and enough tokens for every expert.
PROBES = ((2, 31), (3, 37))


class ProbeFailed(InputError):
    """The LM could not be run: it needs values, which the meta device lacks, or it reads neither tokens nor images."""


def probe(base_model: PreTrainedModel, sites: list[Site]) -> dict[Site, tuple[Site, int]]:
    """
    Finds the width of the activations at each site with two short forward passes. The LM may be on the meta device.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): The sites to measure.

    Returns:
        `dict[Site, tuple[Site, int]]`: for each site, the site again and its width. The site has `within` set if its
        module may run any number of times.

    Raises:
        `InputError`: if a site is not reached, has no tensor, or does not have one activation per token.
        [`ProbeFailed`]: if the LM cannot be run.
    """
    runs = [_Run(base_model, sites, *size) for size in PROBES]
    return {site: _judge(base_model, site, runs) for site in sites}


class _Run:
    """
    One forward pass, and the shapes that it had at each site.

    Attributes:
        shapes (`dict[Site, list[torch.Size]]`): Shapes of a site's activations, in the order in which these came.
        once_around (`dict[Site, set[str]]`): Modules around a site that ran once, and inside which all of the site's
            activations came.
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
    Runs an LM, which may be on the meta device, on random tokens or images.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        rows (`int`): Number of sequences.
        ctx_len (`int`): Tokens per sequence.

    Raises:
        [`ProbeFailed`]: if the LM cannot be run.
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
        # The weights lie on disk. Accelerate reads them during the pass, and moves the inputs to their device.
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
    """Whether a module runs several times on whole batches, as a shared layer does, or on a choice of tokens."""
    whole = all(_by_token(base_model, shape, *size) for run, size in zip(shapes, PROBES, strict=True) for shape in run)
    flat = all(len(shape) == 2 for run in shapes for shape in run)
    # A pooler gives one row per sequence, and a table of positions one row per place in the sequence.
    fixed = any(
        all(len(run) == 1 and run[0][0] == size[i] for run, size in zip(shapes, PROBES, strict=True)) for i in (0, 1)
    )
    return whole or (flat and not fixed)


def _around(name: str) -> list[str]:
    """Names of the modules around a module, innermost first. The last is the base model, whose name is empty."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]

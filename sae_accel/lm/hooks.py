"""
Reads activations from a running LM.

A `Site` is a place in the LM: the input or the output of one module. `record` puts a hook on each site, and the hook
hands over every tensor that passes. `capture` runs the LM on a batch, copies the activations at each site, and stops
the forward pass after the last site. A hook only reads: nothing here changes or trains the LM.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..common.errors import InputError


class Site(NamedTuple):
    """
    A place in an LM where an activation can be read.

    Args:
        module (`str`): Name of a submodule of the base model.
        side (`str`): `"input"` or `"output"` of that module.
        within (`str`, *optional*): For a module that may run any number of times, such as an expert of a mixture or a
            shared layer: the nearest module around it that runs once. When that one ends, all activations have come.
    """

    module: str
    side: Literal["input", "output"]
    within: str | None = None


class _AllRecorded(Exception):
    """Ends a forward pass once every site has been read, since the rest would be computed for nothing."""


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The base model of an LM: the LM without its own head."""
    return cast(PreTrainedModel, model.base_model)


def token_model(base_model: PreTrainedModel) -> nn.Module:
    """The part of an LM that runs on tokens alone: the encoder of an encoder-decoder model, else the whole LM."""
    return base_model.get_encoder() if base_model.config.is_encoder_decoder else base_model


@contextmanager
def record(
    base_model: PreTrainedModel, sites: list[Site], on_tensor: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """
    Calls `on_tensor(site, tensor)` for each site as forward passes of `base_model` reach it.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): Where to read.
        on_tensor (`Callable[[Site, Tensor], None]`): Receives each activation, `(..., d)`.
    """

    def watch(site: Site) -> RemovableHandle:
        module = base_model.get_submodule(site.module)
        if site.side == "input":
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: on_tensor(site, first_tensor((*args, *kwargs.values()), site)),
                with_kwargs=True,
            )
        return module.register_forward_hook(lambda _, args, output: on_tensor(site, first_tensor(output, site)))

    with ExitStack() as stack:
        for site in sites:
            stack.callback(watch(site).remove)
        yield


def first_tensor(value: Any, site: Site) -> Tensor:
    """
    The activation in a module's input or output: the tensor itself, or the first floating-point tensor of a tuple or
    `ModelOutput`.

    Raises:
        `InputError`: if there is no floating-point tensor.
    """
    if isinstance(value, Tensor):
        value = (value,)
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    for item in values:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise InputError(
        f"The {site.side} of module {site.module!r} holds no floating-point tensor (found {type(value).__name__}), so "
        "no head can be trained on it. Choose another hookpoint."
    )


def capture(base_model: PreTrainedModel, sites: list[Site], inputs: dict[str, Any]) -> dict[Site, Tensor]:
    """Runs the LM as `capture_pieces` does, and joins each module's runs: one tensor per site, `(num_rows, d)`."""
    found = capture_pieces(base_model, sites, inputs)
    # Each piece is (rows of one run, d), and they add up to (num_rows, d).
    return {site: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for site, pieces in found.items()}


@torch.no_grad()
def capture_pieces(base_model: PreTrainedModel, sites: list[Site], inputs: dict[str, Any]) -> dict[Site, list[Tensor]]:
    """
    Runs the LM up to the last of `sites` and no further. A sharded LM runs to the end of that site's layer.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): Where to read.
        inputs (`dict`): Arguments of the LM's forward pass.

    Returns:
        `dict[Site, list[Tensor]]`: for each site, one copy of the activations per run of its module, `(num_rows, d)`,
        in the LM's own precision. A site with `within` that was not reached is left out.

    Raises:
        `InputError`: if a site was not reached.
    """
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    completed_by = {site: _completed_by(base_model, site) for site in sites}
    waiting = set(sites)

    def keep(site: Site, tensor: Tensor) -> None:
        # A copy, because some modules later change their input or output in place.
        found[site].append(tensor.reshape(-1, tensor.shape[-1]).clone())  # (batch, ctx_len, d) -> (num_rows, d)
        if completed_by[site] is None:
            done(site)

    def done(site: Site) -> None:
        waiting.discard(site)
        if not waiting:
            raise _AllRecorded

    with ExitStack() as stack:
        stack.enter_context(record(base_model, sites, keep))
        for site, module in completed_by.items():
            if module is not None:
                stack.callback(module.register_forward_hook(lambda *_, site=site: done(site)).remove)
        try:
            token_model(base_model)(**inputs)
        except _AllRecorded:
            pass
    if missing := [site for site in sites if not found[site] and site.within is None]:
        raise InputError(f"The forward pass of the LM did not reach the {missing[0].side} of {missing[0].module!r}.")
    return {site: pieces for site, pieces in found.items() if pieces}


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes each hold a part of some module's parameters, and so must run the module together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _completed_by(base_model: PreTrainedModel, site: Site) -> nn.Module | None:
    """
    The module at whose end a site has received everything, so that the forward pass may end there. None if the pass
    may end as soon as the site is reached.

    A pass that ended inside a sharded module would leave that module's parameters gathered. So the pass goes on to the
    end of the outermost sharded module around the site. FSDP's own hook runs there first, and frees the parameters.
    """
    last = site.module if site.within is None else site.within
    parts = last.split(".")
    around = [base_model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    sharded = (module for module in around if isinstance(module, FSDPModule))
    return next(sharded, None if site.within is None else around[-1])

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
            layer that is shared: the nearest module around it that runs once, after which nothing more is to come.
    """

    module: str
    side: Literal["input", "output"]
    within: str | None = None


class _AllRecorded(Exception):
    """Ends a forward pass once every site has been read: what follows would be computed for nothing."""


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """An LM without its own head."""
    return cast(PreTrainedModel, model.base_model)


def token_model(base_model: PreTrainedModel) -> nn.Module:
    """The part of an LM that runs on tokens alone: of an encoder and a decoder, the encoder."""
    return base_model.get_encoder() if base_model.config.is_encoder_decoder else base_model


@contextmanager
def record(
    base_model: PreTrainedModel, sites: list[Site], on_tensor: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """
    Calls `on_tensor(site, tensor)` for each site as forward passes of `base_model` reach it.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): What to read.
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
    The activation in what a module takes or gives: the tensor itself, or the first of a tuple or `ModelOutput`.

    Raises:
        `InputError`: if there is no floating-point tensor in it.
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
    """As `capture_pieces`, with what the runs of a module gave one after the other: by site `(num_rows, d)`."""
    found = capture_pieces(base_model, sites, inputs)
    return {site: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for site, pieces in found.items()}


@torch.no_grad()
def capture_pieces(base_model: PreTrainedModel, sites: list[Site], inputs: dict[str, Any]) -> dict[Site, list[Tensor]]:
    """
    Runs the LM up to the last of `sites`, and no further, but for the rest of the layer if the LM is sharded.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): What to read.
        inputs (`dict`): Arguments of its forward pass.

    Returns:
        `dict[Site, list[Tensor]]`: for each site a copy of what each run of its module gave, `(num_rows, d)`, in the
        LM's own precision; a site with `within` that was not reached is left out.

    Raises:
        `InputError`: if a site was not reached.
    """
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    completed_by = {site: _completed_by(base_model, site) for site in sites}
    waiting = set(sites)

    def keep(site: Site, tensor: Tensor) -> None:
        # A copy, because some modules go on to change their input or output in place.
        found[site].append(tensor.reshape(-1, tensor.shape[-1]).clone())
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
    """Whether some module's parameters lie in parts on several processes, which must then all run it together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _completed_by(base_model: PreTrainedModel, site: Site) -> nn.Module | None:
    """
    The module at whose end a site has all that is to come, and a forward pass may be ended. None if one may be ended
    as soon as the site is reached.

    A pass that ended inside a sharded module would leave its parameters gathered, so it goes on to the end of the
    outermost one around the site, where FSDP's own hook, which is older than any here, has let go of them.
    """
    last = site.module if site.within is None else site.within
    parts = last.split(".")
    around = [base_model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    sharded = (module for module in around if isinstance(module, FSDPModule))
    return next(sharded, None if site.within is None else around[-1])

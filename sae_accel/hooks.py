from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InputError
from .models import HeadModel, Latents, TranscoderModel


class Site(NamedTuple):
    """
    A place in an LM where an activation can be read.

    Args:
        module (`str`): Name of a submodule of the base model.
        side (`str`): `"input"` or `"output"` of that module.
    """

    module: str
    side: Literal["input", "output"]


class _AllRecorded(Exception):
    """Ends a forward pass once every site has been read: what follows would be computed for nothing."""


@contextmanager
def record(base_model: PreTrainedModel, sites: list[Site], on_tensor: Any) -> Iterator[None]:
    """
    Calls `on_tensor(site, tensor)` for each site as forward passes of `base_model` reach it.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): What to read.
        on_tensor (`Callable[[Site, Tensor], None]`): Receives each activation, `(..., d)`.
    """

    def watch(site: Site) -> Any:
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


@torch.no_grad()
def capture(
    base_model: PreTrainedModel, sites: list[Site], inputs: dict[str, Any], tokens: Tensor | None = None
) -> dict[Site, Tensor]:
    """
    Runs the LM up to the last of `sites`, and no further.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        sites (`list[Site]`): What to read.
        inputs (`dict`): Arguments of its forward pass.
        tokens (`torch.LongTensor` of shape `(num_tokens,)`, *optional*): Positions, in the flattened batch, that are
            kept; all if not given.

    Returns:
        `dict[Site, Tensor]`: for each site a copy of its activations, `(num_tokens, d)`, in the LM's own precision.

    Raises:
        `InputError`: if a site was not reached.
    """
    activations: dict[Site, Tensor] = {}

    def keep(site: Site, tensor: Tensor) -> None:
        rows = tensor.reshape(-1, tensor.shape[-1])
        # A copy, because some modules go on to change their input or output in place.
        activations[site] = rows.clone() if tokens is None else rows[tokens.to(rows.device)]
        if len(activations) == len(sites):
            raise _AllRecorded

    with record(base_model, sites, keep):
        try:
            base_model(**inputs)
        except _AllRecorded:
            pass
    if missing := [site for site in sites if site not in activations]:
        raise InputError(f"The forward pass of the LM did not reach the {missing[0].side} of {missing[0].module!r}.")
    return activations


@contextmanager
def splice(
    model: PreTrainedModel, heads: HeadModel | Mapping[str, HeadModel], *, replace: bool = True
) -> Iterator[dict[str, Latents]]:
    """
    Puts heads into a running LM: while the context is open, each hookpoint gives its head's reconstruction.

    Args:
        model (`PreTrainedModel`): The LM, with or without its own head.
        heads ([`HeadModel`] or `Mapping[str, HeadModel]`): One head, whose config names its hookpoint, or heads by
        name.
        replace (`bool`, defaults to `True`): `False` leaves the LM as it is and only reads latents.

    Yields:
        `dict[str, Latents]`: for each head the latents of the latest forward pass, each `(..., k)`.

    Raises:
        `InputError`: if the LM has no module of a head's name, or two heads would replace one output.

    Examples:
        ```python
        with splice(lm, AutoSae.from_pretrained("runs/quickstart")) as latents:
            loss = lm(**inputs, labels=inputs["input_ids"]).loss
        latents["layers.2"].top_indices
        ```
    """
    if isinstance(heads, HeadModel):
        heads = {heads.config.hookpoint or "": heads}
    latents: dict[str, Latents] = {}
    replaced: set[str] = set()
    with ExitStack() as stack:
        for name, head in heads.items():
            hookpoint = head.config.hookpoint or name.split("/")[0]
            if replace and hookpoint in replaced:
                raise InputError(
                    f"Two heads would replace the output of {hookpoint!r}. Splice one, or set replace=False."
                )
            replaced.add(hookpoint)
            for handle in _splice_one(model.base_model, name, hookpoint, head, latents, replace):
                stack.callback(handle.remove)
        yield latents


def _splice_one(base_model, name, hookpoint, head, latents, replace) -> list[Any]:
    target = Site(hookpoint, "output")
    source = source_site(head, hookpoint)
    read: dict[Site, Tensor] = {}

    def on_source(activations: Tensor) -> None:
        latents[name] = head.encode(activations)
        read[source] = activations

    def on_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        on_source(first_tensor((*args, *kwargs.values()), source))

    def on_output(module: nn.Module, args: tuple, output: Any) -> Any:
        if source == target:
            on_source(first_tensor(output, target))
        original = first_tensor(output, target)
        reconstruction = head.decode(*latents[name], read.pop(source)).to(original.dtype)
        return _replace_first(output, original, reconstruction)

    try:
        module = base_model.get_submodule(hookpoint)
        reads_from = base_model.get_submodule(source.module)
    except AttributeError as error:
        raise InputError(f"Head {name!r} does not fit {type(base_model).__name__}: {error}.") from error
    handles = []
    if source.side == "input":
        handles.append(reads_from.register_forward_pre_hook(on_input, with_kwargs=True))
    elif source != target or not replace:
        handles.append(
            reads_from.register_forward_hook(lambda _, args, output: on_source(first_tensor(output, source)))
        )
    if replace:
        handles.append(module.register_forward_hook(on_output))
    return handles


def source_site(head: HeadModel, hookpoint: str) -> Site:
    """Where a head reads: an SAE its hookpoint's output; a transcoder its input, or the output of its `source`."""
    if head.config.source is not None:
        return Site(head.config.source, "output")
    return Site(hookpoint, "input" if isinstance(head, TranscoderModel) else "output")


def _replace_first(output: Any, original: Tensor, replacement: Tensor) -> Any:
    """`output` with the tensor `original` exchanged, whatever container it sits in."""
    if output is original:
        return replacement
    if isinstance(output, Mapping):
        return type(output)({key: replacement if value is original else value for key, value in output.items()})
    return tuple(replacement if value is original else value for value in output)

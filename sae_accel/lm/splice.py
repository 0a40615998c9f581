"""
Puts heads into a running LM, so that later layers read reconstructions in place of true activations.

A head that reads its own hookpoint's output, such as an SAE, needs one hook: it takes the output and returns the
reconstruction. A head that reads elsewhere, such as a transcoder, replaces the forward method of its hookpoint. The
module that it replaces need not run at all, unless the LM caches keys and values or the module has further outputs.
When the context closes, hooks and forward methods are as before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..common.errors import InputError
from ..models import HeadModel, Latents
from .hooks import Site, base_of, first_tensor
from .modules import hookpoint_names
from .other_names import near_names


@dataclass(frozen=True)
class Replacement:
    """
    A replacement for the output of one module.

    Args:
        name (`str`): Name of the head, for errors.
        hookpoint (`str`): Module of the base model whose output is replaced.
        reads (`Site`): Where the input of `compute` is read.
        compute (`Callable`): Takes the activation that was read, `(..., d_in)`, and the module's own output, `(...,
            d_out)`, or None if the module did not run. Returns the new output, `(..., d_out)`.
        needs_output (`bool`): Whether the module must run, although `reads` is not its output.
    """

    name: str
    hookpoint: str
    reads: Site
    compute: Callable[[Tensor, Tensor | None], Tensor | None]
    needs_output: bool = False


@contextmanager
def splice(
    model: PreTrainedModel, heads: HeadModel | Mapping[str, HeadModel], *, replace: bool = True
) -> Iterator[dict[str, Latents]]:
    """
    Puts heads into a running LM. While the context is open, each hookpoint's output is its head's reconstruction.

    A transcoder replaces a whole module. That module runs once, which shows whether it has further outputs. If it has
    none, it does not run again.

    Args:
        model (`PreTrainedModel`): The LM, with or without its own head.
        heads ([`HeadModel`] or `Mapping[str, HeadModel]`): One head, whose config names its hookpoint, or several
            heads by name.
        replace (`bool`, defaults to `True`): `False` leaves the LM as it is and only reads latents.

    Yields:
        `dict[str, Latents]`: for each head the latents of the latest forward pass, `(batch, ctx_len, k)`.

    Raises:
        `InputError`: if the LM has no module of a head's name, or two heads would replace one output.

    Examples:
        ```python
        from sae_accel import splice

        with splice(lm, sae) as latents:
            loss = lm(**inputs, labels=inputs["input_ids"]).loss
        latents["layers.1"].top_indices  # (batch, ctx_len, k)
        ```

        With `replace=False` the LM's output stays as it is, and the latents are only read:

        ```python
        from sae_accel import AutoSae, splice

        with splice(lm, AutoSae.from_pretrained("runs/quickstart"), replace=False) as latents:
            lm(**inputs)
        {name: acts.top_acts.shape for name, acts in latents.items()}
        ```
    """
    if isinstance(heads, HeadModel):
        heads = {heads.config.hookpoint or "": heads}
    latents: dict[str, Latents] = {}

    def through(name: str, head: HeadModel) -> Replacement:
        def compute(activations: Tensor, original: Tensor | None) -> Tensor | None:
            latents[name] = head.encode(activations)  # (..., d_in) -> (..., k)
            return head.decode(latents[name], activations=activations) if replace else original  # (..., d_out)

        hookpoint = head.config.hookpoint or name.split("/")[0]
        if not hookpoint:
            raise InputError(
                "The config of a head has no hookpoint. Set head.config.hookpoint to the name of a module of the base "
                "model, such as 'layers.3'."
            )
        return Replacement(name, hookpoint, source_site(head, hookpoint), compute, not replace)

    with replaced(base_of(model), [through(name, head) for name, head in heads.items()], unique=replace):
        yield latents


@contextmanager
def replaced(base_model: PreTrainedModel, replacements: Iterable[Replacement], unique: bool = True) -> Iterator[None]:
    """
    While open, forward passes of `base_model` go through `replacements`.

    Args:
        base_model (`PreTrainedModel`): The LM without its head.
        replacements (`Iterable[Replacement]`): The replacements, at most one per hookpoint if `unique`.
        unique (`bool`, defaults to `True`): Whether to refuse two replacements of one output.

    Raises:
        `InputError`: if the LM has no module of a replacement's name, or two replacements are for one output.
    """
    seen: set[str] = set()
    with ExitStack() as stack:
        for replacement in replacements:
            if unique and replacement.hookpoint in seen:
                raise InputError(
                    f"Two heads would replace the output of {replacement.hookpoint!r}. Splice one, or set "
                    "replace=False."
                )
            seen.add(replacement.hookpoint)
            stack.enter_context(_replaced_one(base_model, replacement))
        yield


def source_site(head: HeadModel, hookpoint: str) -> Site:
    """
    The place where a head at a hookpoint reads.

    Raises:
        `InputError`: if the head reads at several places, or predicts anything but its hookpoint's output.
    """
    reads, predicts = head.config.reads_at(hookpoint, head.config.source), head.config.predicts_at(hookpoint)
    if len(reads) > 1 or predicts != ((hookpoint, "output"),):
        raise InputError(
            f"A {head.config.title} at {hookpoint!r} cannot be spliced in. A head can be spliced if it reads one "
            "activation and predicts the output of its hookpoint."
        )
    return Site(*reads[0])


@contextmanager
def _replaced_one(base_model: PreTrainedModel, replacement: Replacement) -> Iterator[None]:
    target = Site(replacement.hookpoint, "output")
    module = _submodule(base_model, replacement, replacement.hookpoint)
    source = _submodule(base_model, replacement, replacement.reads.module)
    if replacement.reads == target:
        handle = module.register_forward_hook(lambda _, args, output: _exchange(replacement, output))
        try:
            yield
        finally:
            handle.remove()
        return
    read: list[Tensor] = []
    with ExitStack() as stack:
        if replacement.reads.module != replacement.hookpoint:
            watch = source.register_forward_hook(
                lambda _, args, output: read.append(first_tensor(output, replacement.reads))
            )
            stack.callback(watch.remove)
        stack.enter_context(_bypassed(module, replacement, read))
        yield


def _submodule(base_model: PreTrainedModel, replacement: Replacement, name: str) -> nn.Module:
    try:
        return base_model.get_submodule(name)
    except AttributeError as error:
        raise InputError(
            f"Head {replacement.name!r} does not fit {type(base_model).__name__}, which has no module {name!r}. "
            f"{near_names(name, base_model, hookpoint_names(base_model))}"
        ) from error


@contextmanager
def _bypassed(module: nn.Module, replacement: Replacement, read: list[Tensor]) -> Iterator[None]:
    """While open, a module's forward pass is the replacement, on the module's input or on the tensor in `read`."""
    forward, was_own = module.forward, "forward" in vars(module)

    def bypass(*args: Any, **kwargs: Any) -> Any:
        if replacement.reads.side == "input":
            activations = first_tensor((*args, *kwargs.values()), replacement.reads)  # (batch, ctx_len, d_in)
        elif read:
            activations = read.pop()  # (batch, ctx_len, d_in)
        else:
            raise InputError(
                f"Head {replacement.name!r} reads {replacement.reads.module!r}, which runs only after "
                f"{replacement.hookpoint!r}. Set head.config.source to a module that runs before."
            )
        caches = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        wraps = None
        if not caches and not replacement.needs_output:
            wraps = _what_is_around(module, forward, args, kwargs)
        if wraps is None:
            output = forward(*args, **kwargs)
            return _exchange(replacement, output, activations)
        new = replacement.compute(activations, None)  # (batch, ctx_len, d_out)
        assert new is not None, "a replacement that only reads needs the module's output"
        return wraps(new.to(activations.dtype))

    module.forward = bypass
    try:
        yield
    finally:
        if was_own:
            module.forward = forward
        else:
            del module.forward


# For each module and kind of attention, a function that wraps an activation as the module's output does. None if the
# output holds more than the activation.
_OUTPUTS: WeakKeyDictionary[nn.Module, dict[str | None, Callable[[Tensor], Any] | None]] = WeakKeyDictionary()


@torch.no_grad()
def _what_is_around(module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Callable[[Tensor], Any] | None:
    """A function that wraps an activation as the module's output does, or None. A first pass shows which."""
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
    known = _OUTPUTS.setdefault(module, {})
    if attention not in known:
        known[attention] = _container(forward(*args, **kwargs))
    return known[attention]


def _container(output: Any) -> Callable[[Tensor], Any] | None:
    if isinstance(output, Tensor):
        return lambda tensor: tensor
    if isinstance(output, tuple) and isinstance(output[0], Tensor) and all(item is None for item in output[1:]):
        rest = output[1:]
        return lambda tensor: (tensor, *rest)
    return None


def _exchange(replacement: Replacement, output: Any, activations: Tensor | None = None) -> Any:
    """Returns `output` with a new activation, in the same tuple or mapping as before."""
    original = first_tensor(output, Site(replacement.hookpoint, "output"))  # (batch, ctx_len, d_out)
    new = replacement.compute(original if activations is None else activations, original)  # (batch, ctx_len, d_out)
    if new is None or new is original:
        return output
    new = new.to(original.dtype)
    if output is original:
        return new
    if isinstance(output, Mapping):
        exchanged = {key: new if value is original else value for key, value in output.items()}
        return type(output)(**exchanged)
    return tuple(new if value is original else value for value in output)

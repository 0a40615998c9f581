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
    What takes the place of a module's output.

    Args:
        name (`str`): Of the head, for errors.
        hookpoint (`str`): Module of the base model whose output is replaced.
        reads (`Site`): Where the input of `compute` comes from.
        compute (`Callable`): From the activation that was read, `(..., d_in)`, and the module's own output, `(...,
            d_out)` or None where the module was not run, to the new output.
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
    Puts heads into a running LM: while the context is open, each hookpoint gives its head's reconstruction. The module
    that a transcoder replaces is not run, once its first pass has shown that it gives nothing else.

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

    def through(name: str, head: HeadModel) -> Replacement:
        def compute(activations: Tensor, original: Tensor | None) -> Tensor | None:
            latents[name] = head.encode(activations)
            return head.decode(latents[name], activations=activations) if replace else original

        hookpoint = head.config.hookpoint or name.split("/")[0]
        if not hookpoint:
            raise InputError(
                "A head's files do not tell where it sits. Set its config.hookpoint to a module of the base model."
            )
        return Replacement(name, hookpoint, source_site(head, hookpoint), compute, not replace)

    with replaced(base_of(model), [through(name, head) for name, head in heads.items()], unique=replace):
        yield latents


@contextmanager
def replaced(base_model: PreTrainedModel, replacements: Iterable[Replacement], unique: bool = True) -> Iterator[None]:
    """
    While open, forward passes of `base_model` go through `replacements`.

    Raises:
        `InputError`: if there is no module of a replacement's name, or, with `unique`, two are for one output.
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
    Where a head at a hookpoint reads.

    Raises:
        `InputError`: if it reads or predicts what lies at several places.
    """
    reads, predicts = head.config.reads_at(hookpoint, head.config.source), head.config.predicts_at(hookpoint)
    if len(reads) > 1 or predicts != ((hookpoint, "output"),):
        raise InputError(
            f"A {head.config.title} at {hookpoint!r} cannot be spliced in: it does not read one activation to replace "
            "the output of its hookpoint."
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
    """A module whose forward pass is the replacement's, on its own input or else on what `read` holds."""
    forward, was_own = module.forward, "forward" in vars(module)

    def bypass(*args: Any, **kwargs: Any) -> Any:
        if replacement.reads.side == "input":
            activations = first_tensor((*args, *kwargs.values()), replacement.reads)
        elif read:
            activations = read.pop()
        else:
            raise InputError(
                f"Head {replacement.name!r} reads {replacement.reads.module!r}, which runs only after "
                f"{replacement.hookpoint!r}. Name a source that runs before."
            )
        caches = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        wraps = None
        if not caches and not replacement.needs_output:
            wraps = _what_is_around(module, forward, args, kwargs)
        if wraps is None:
            output = forward(*args, **kwargs)
            return _exchange(replacement, output, activations)
        new = replacement.compute(activations, None)
        assert new is not None, "what only reads needs the module's output"
        return wraps(new.to(activations.dtype))

    module.forward = bypass
    try:
        yield
    finally:
        if was_own:
            module.forward = forward
        else:
            del module.forward


# By module, and by the attention that it may be told to use, how its output is made from the activation alone; None if
# there is more in it.
_OUTPUTS: WeakKeyDictionary[nn.Module, dict[str | None, Callable[[Tensor], Any] | None]] = WeakKeyDictionary()


@torch.no_grad()
def _what_is_around(module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Callable[[Tensor], Any] | None:
    """How a module's output is made from its activation, if that is all there is in it, which a first pass tells."""
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
    """`output` with its activation exchanged, whatever container it sits in."""
    original = first_tensor(output, Site(replacement.hookpoint, "output"))
    new = replacement.compute(original if activations is None else activations, original)
    if new is None or new is original:
        return output
    new = new.to(original.dtype)
    if output is original:
        return new
    if isinstance(output, Mapping):
        exchanged = {key: new if value is original else value for key, value in output.items()}
        return type(output)(**exchanged)
    return tuple(new if value is original else value for value in output)

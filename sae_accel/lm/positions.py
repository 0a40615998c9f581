"""How long a sequence an LM can read, and which positions its tokens have."""

import inspect
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..processes.agreement import say
from ..recipe.arguments import DEFAULT_CTX_LEN
from .hooks import base_of, token_model
from .probe import ProbeFailed, run_on_tokens


# Tokens beyond those that an LM states: more than rows that a table has to spare.
_BEYOND = 37
# Nobody learns more positions; and a pass over as many tokens takes its time, even without values.
_LONGEST_TABLE = 2**15


class Positions(NamedTuple):
    """
    How many positions an LM has.

    Args:
        tokens (`int`): The most that a sequence can have.
        learned (`bool`): Whether each position is a row of an embedding, so that there is nothing beyond the last.
    """

    tokens: int
    learned: bool


def settled_ctx_len(ctx_len: int | None, model: PreTrainedModel) -> int:
    """
    The length of the sequences of a run.

    Args:
        ctx_len (`int`, *optional*): What the recipe asks for; the least of 2,048 and what the LM has if not given.
        model (`PreTrainedModel`): The LM, or its architecture on the meta device.

    Raises:
        `InputError`: if the LM has no positions for as many tokens. Where positions are computed, and not looked up,
            it is only said that there are more tokens than the LM was made for.
    """
    positions = positions_of(model)
    if positions is None:
        return ctx_len or DEFAULT_CTX_LEN
    if ctx_len is None:
        return min(DEFAULT_CTX_LEN, positions.tokens)
    if ctx_len > positions.tokens and positions.learned:
        raise InputError(
            f"data.ctx_len: {ctx_len:,} is more than the {positions.tokens:,} positions that {model.name_or_path!r} "
            "has. Lower it, or remove it."
        )
    if ctx_len > positions.tokens:
        say(f"data.ctx_len: {ctx_len:,} is more than the {positions.tokens:,} tokens that the LM was made for.")
    return ctx_len


def positions_of(model: PreTrainedModel) -> Positions | None:
    """The positions of an LM, which may be on the meta device; None if it states none, or reads no tokens."""
    base_model = base_of(model)
    if base_model.main_input_name == "pixel_values":
        return None
    config = cast(PreTrainedModel, token_model(base_model)).config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    looked_up = _looked_up(base_model, stated) if stated <= _LONGEST_TABLE else None
    return Positions(stated if looked_up is None else looked_up, looked_up is not None)


def _looked_up(base_model: PreTrainedModel, stated: int) -> int | None:
    """
    Positions in the table in which an LM looks them up; None if it computes them. It is run on the meta device, where
    no value is looked at, on more tokens than it states: then a table that is too short is still used.
    """
    if next(base_model.parameters()).device.type != "meta":
        return None
    with _Lookups(stated) as lookups:
        runs_beyond = _runs(base_model, stated + _BEYOND)
    # A table from which as many rows are cut as there are tokens does not fit then.
    cut = not runs_beyond and (_runs(base_model, stated) or _has_table(base_model, stated))
    return min([*lookups.found, *([stated] if cut else [])], default=None)


def _has_table(base_model: PreTrainedModel, stated: int) -> bool:
    """Of an LM that runs on values only this is all that can be known."""
    embeddings = (module for module in base_model.modules() if isinstance(module, nn.Embedding))
    others = (module for module in embeddings if module is not base_model.get_input_embeddings())
    return any(stated <= module.num_embeddings < stated + _BEYOND for module in others)


def _runs(base_model: PreTrainedModel, tokens: int) -> bool:
    try:
        run_on_tokens(base_model, 1, tokens)
    except ProbeFailed:
        return False
    return True


def without_unknown_positions(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    A batch without its `position_ids` if what reads the tokens takes none, or finds them by its padding token as
    RoBERTa does.

    Args:
        module (`nn.Module`): What reads the tokens.
        batch (`dict[str, torch.Tensor]`): As `collate` makes it.
    """
    if "position_ids" not in batch or _takes_positions(module):
        return batch
    return {name: value for name, value in batch.items() if name != "position_ids"}


def _takes_positions(module: nn.Module) -> bool:
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return False
    tables = (part for name, part in module.named_modules() if "position" in name and isinstance(part, nn.Embedding))
    return all(table.padding_idx is None for table in tables)


class _Lookups(TorchDispatchMode):
    """
    Notes tables with too few rows for the tokens that are looked up in them.

    Args:
        stated (`int`): Positions that the LM states. A table may have some rows more, for padding.

    Attributes:
        found (`list[int]`): Positions in each.
    """

    def __init__(self, stated: int):
        super().__init__()
        self.stated = stated
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:
            # RoBERTa and alike have no positions in the rows up to that of padding.
            self._note(args[0].shape[0], args[1], 1 + (args[2] if len(args) > 2 else -1))
        elif func is torch.ops.aten.index.Tensor:
            self._note(args[0].shape[0], args[1][0], 0)
        elif func in (torch.ops.aten.gather.default, torch.ops.aten.index_select.default):
            self._note(args[0].shape[args[1]], args[2], 0)
        return func(*args, **kwargs)

    def _note(self, rows: int, indices: Tensor | None, unused: int) -> None:
        as_many = indices is not None and self.stated + _BEYOND in indices.shape
        if as_many and self.stated <= rows < self.stated + _BEYOND:
            self.found.append(min(self.stated, rows - unused))

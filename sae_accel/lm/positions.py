"""
Finds how long a sequence an LM can read, and whether the LM takes positions with its tokens.

An LM states its number of positions in its config, but the number means two things. An LM that looks each position up
in a table fails beyond the last row. An LM that computes positions, such as one with rotary embeddings, only gets
worse. To tell one from the other, the LM is run on the meta device, where nothing is computed, on a few more tokens
than it states, and every lookup in a table is noted.
"""

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


# A trial run has this many tokens more than the LM states. A table has fewer spare rows than this.
_BEYOND = 37
# No LM has learned more positions than this, and a longer trial run would take long even without values.
_LONGEST_TABLE = 2**15


class Positions(NamedTuple):
    """
    How many positions an LM has.

    Args:
        tokens (`int`): The most that a sequence can have.
        learned (`bool`): Whether each position is a row of an embedding, so that no position exists beyond the last.
    """

    tokens: int
    learned: bool


def settled_ctx_len(ctx_len: int | None, model: PreTrainedModel) -> int:
    """
    The length of the sequences of a run.

    Args:
        ctx_len (`int`, *optional*): The recipe's length. If not given: 2,048, or the LM's number of positions if that
            is less.
        model (`PreTrainedModel`): The LM, or its architecture on the meta device.

    Raises:
        `InputError`: if `ctx_len` is more than the positions that the LM looks up. If the LM computes them, a line
            only says that the sequence is longer than the LM was made for.
    """
    positions = positions_of(model)
    if positions is None:
        return ctx_len or DEFAULT_CTX_LEN
    if ctx_len is None:
        return min(DEFAULT_CTX_LEN, positions.tokens)
    if ctx_len > positions.tokens and positions.learned:
        raise InputError(
            f"data.ctx_len: {ctx_len:,} is more than the {positions.tokens:,} positions that {model.name_or_path!r} "
            f"has. Set --data.ctx_len {positions.tokens}, or remove it."
        )
    if ctx_len > positions.tokens:
        say(f"data.ctx_len: {ctx_len:,} is more than the {positions.tokens:,} tokens that the LM was made for.")
    return ctx_len


def positions_of(model: PreTrainedModel) -> Positions | None:
    """The positions of an LM, which may be on the meta device. None if it states none, or reads no tokens."""
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
    Number of positions in the table in which an LM looks them up. None if the LM computes its positions.

    The LM runs on the meta device, on more tokens than it states. No value is read there, so a table that is too short
    raises no error, and its size can be noted.
    """
    if next(base_model.parameters()).device.type != "meta":
        return None
    with _Lookups(stated) as lookups:
        runs_beyond = _runs(base_model, stated + _BEYOND)
    # An LM that slices one row per token from its table fails on the longer sequence: the slice is too short.
    cut = not runs_beyond and (_runs(base_model, stated) or _has_table(base_model, stated))
    return min([*lookups.found, *([stated] if cut else [])], default=None)


def _has_table(base_model: PreTrainedModel, stated: int) -> bool:
    """Whether an LM has a table of the stated size. If the LM needs values to run, nothing more can be known."""
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
    A batch without its `position_ids`, if the module takes none, or computes positions from its padding token as
    RoBERTa does.

    Args:
        module (`nn.Module`): The module that reads the tokens.
        batch (`dict[str, torch.Tensor]`): A batch from `collate`, each tensor `(batch, ctx_len)`.
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
    Notes each table with fewer rows than there are tokens to look up.

    Args:
        stated (`int`): Number of positions that the LM states. A table may have a few rows more, for padding.

    Attributes:
        found (`list[int]`): Number of positions in each table.
    """

    def __init__(self, stated: int):
        super().__init__()
        self.stated = stated
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:
            # Table (rows, d), indices (batch, ctx_len). RoBERTa's rows up to the padding row hold no positions.
            self._note(args[0].shape[0], args[1], 1 + (args[2] if len(args) > 2 else -1))
        elif func is torch.ops.aten.index.Tensor:
            self._note(args[0].shape[0], args[1][0], 0)  # table (rows, ...)
        elif func in (torch.ops.aten.gather.default, torch.ops.aten.index_select.default):
            self._note(args[0].shape[args[1]], args[2], 0)  # table with its rows along dimension args[1]
        return func(*args, **kwargs)

    def _note(self, rows: int, indices: Tensor | None, unused: int) -> None:
        as_many = indices is not None and self.stated + _BEYOND in indices.shape
        if as_many and self.stated <= rows < self.stated + _BEYOND:
            self.found.append(min(self.stated, rows - unused))

"""Joins rows into padded batches, and marks which of their tokens train."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


# One sequence of token ids, or one image, as values by name.
Row = dict[str, Any]


@runtime_checkable
class IndexedRows(Protocol):
    """Rows with a length, which can be read in any order, such as a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


# The data that a run may train on: rows with a length, or a stream of rows.
Rows = IndexedRows | Iterable[Row]


def collate(rows: Sequence[Row], pad_token_id: int = 0) -> dict[str, Tensor]:
    """
    Joins rows into a batch: pads sequences on the right to one length, or stacks images.

    Args:
        rows (`list[dict]`): Each row has `input_ids`, and optionally `attention_mask`; or each row has `pixel_values`.
        pad_token_id (`int`, defaults to 0): Id of the padding.

    Returns:
        `dict`: `input_ids` and `attention_mask`, each `(batch, ctx_len)`, long; or `pixel_values`,
        `(batch, channels, height, width)`. If a row is padded on the left, also `position_ids`, `(batch, ctx_len)`:
        the first token of each row has position 0, as it would without padding.
    """
    if "pixel_values" in rows[0]:
        return {"pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]).float() for row in rows])}
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    masks = [
        torch.as_tensor(row["attention_mask"], dtype=torch.long) if "attention_mask" in row else torch.ones_like(one)
        for row, one in zip(rows, ids, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad(masks, batch_first=True, padding_value=0)  # (batch, ctx_len)
    batch = {"input_ids": pad(ids, batch_first=True, padding_value=pad_token_id), "attention_mask": mask}
    # The host computes the positions here from numbers that it has; it would have to wait for a GPU.
    return batch if mask[:, :1].all() else {**batch, "position_ids": _positions(mask)}


def _positions(mask: Tensor) -> Tensor:
    filling = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # (batch, 1), padding on the left
    return (torch.arange(mask.shape[1]) - filling).clamp(min=0)


def token_mask(batch: dict[str, Tensor], exclude_tokens: Iterable[int]) -> Tensor | None:
    """
    Marks the tokens that train and are measured: all tokens except padding and excluded ids.

    Args:
        batch (`dict`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`; or `pixel_values`.
        exclude_tokens (`Iterable[int]`): Ids that are left out.

    Returns:
        `torch.BoolTensor` of shape `(batch, ctx_len)`; None for images, where every patch trains.
    """
    return text_mask(batch, exclude_tokens) if "input_ids" in batch else None


def text_mask(batch: dict[str, Tensor], exclude_tokens: Iterable[int]) -> Tensor:
    """Like `token_mask`, for a batch that holds text."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    excluded = torch.tensor(list(exclude_tokens), dtype=ids.dtype, device=ids.device)
    return mask & ~torch.isin(ids, excluded) if len(excluded) else mask

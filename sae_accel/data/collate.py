from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


# A sequence of token ids, or an image, by the names of what it has.
Row = dict[str, Any]


@runtime_checkable
class IndexedRows(Protocol):
    """Rows with a length, which can be read in any order, such as a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


# What a run may train on: rows with a length, or a stream of them.
Rows = IndexedRows | Iterable[Row]


def collate(rows: Sequence[Row], pad_token_id: int = 0) -> dict[str, Tensor]:
    """
    A batch of sequences, filled up on the right where they differ in length, or of images.

    Args:
        rows (`list[dict]`): Each with `input_ids`, and optionally `attention_mask`; or with `pixel_values`.
        pad_token_id (`int`, defaults to 0): What stands where a sequence has ended.

    Returns:
        `dict`: `input_ids` and `attention_mask`, each `(batch, ctx_len)`, long; or `pixel_values`, `(batch, channels,
        height, width)`. If a row is filled up on the left, `position_ids` too, `(batch, ctx_len)`: its first token has
        position 0, as it has without the filling.
    """
    if "pixel_values" in rows[0]:
        return {"pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]).float() for row in rows])}
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    masks = [
        torch.as_tensor(row["attention_mask"], dtype=torch.long) if "attention_mask" in row else torch.ones_like(one)
        for row, one in zip(rows, ids, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad(masks, batch_first=True, padding_value=0)
    batch = {"input_ids": pad(ids, batch_first=True, padding_value=pad_token_id), "attention_mask": mask}
    # Found here, where the host has the numbers at hand, and not on a device that it would wait for.
    return batch if mask[:, :1].all() else {**batch, "position_ids": _positions(mask)}


def _positions(mask: Tensor) -> Tensor:
    filling = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    return (torch.arange(mask.shape[1]) - filling).clamp(min=0)


def token_mask(batch: dict[str, Tensor], exclude_tokens: Iterable[int]) -> Tensor | None:
    """
    Which tokens train and are measured: those that are not padding and not excluded.

    Args:
        batch (`dict`): `input_ids` and `attention_mask`, each `(batch, ctx_len)`; or `pixel_values`.
        exclude_tokens (`Iterable[int]`): Ids that are left out.

    Returns:
        `torch.BoolTensor` of shape `(batch, ctx_len)`; None for images, where every patch trains.
    """
    return text_mask(batch, exclude_tokens) if "input_ids" in batch else None


def text_mask(batch: dict[str, Tensor], exclude_tokens: Iterable[int]) -> Tensor:
    """As `token_mask`, of a batch that is text."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    excluded = torch.tensor(list(exclude_tokens), dtype=ids.dtype, device=ids.device)
    return mask & ~torch.isin(ids, excluded) if len(excluded) else mask

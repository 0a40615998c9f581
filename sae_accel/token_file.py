from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .errors import InputError


# Ids that are looked at, spread over the file, to find a wrong width before training does.
SAMPLED_IDS = 2**20


class TokenFile(Dataset):
    """
    Token ids in a file without header, read through memory as they are needed.

    Args:
        path (`str`): The file.
        ctx_len (`int`): Tokens in a sequence; what does not fill a last one is left out.
        vocab_size (`int`): Ids that the LM knows.
        token_dtype (`str`, *optional*): `"uint16"` or `"uint32"`; uint16 if not given and the vocabulary fits in it, else
            uint32.

    Raises:
        `InputError`: if the file is missing, too short, or does not hold ids of that width.
    """

    def __init__(self, path: str, ctx_len: int, vocab_size: int, token_dtype: str | None = None):
        dtype = np.dtype(token_dtype or ("uint16" if vocab_size <= 2**16 else "uint32"))
        if not Path(path).is_file():
            raise InputError(f"data.path: there is no file {path!r}.")
        size = Path(path).stat().st_size
        if size < ctx_len * dtype.itemsize:
            raise InputError(
                f"data.path: {path!r} holds {size // dtype.itemsize} tokens of {dtype}, less than one sequence of "
                f"data.ctx_len = {ctx_len}."
            )
        ids = np.memmap(path, dtype=dtype, mode="r", shape=(size // dtype.itemsize,))
        _check_width(ids, path, vocab_size)
        self.sequences = ids[: len(ids) // ctx_len * ctx_len].reshape(-1, ctx_len)
        self.order = np.arange(len(self.sequences))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.sequences[self.order[index]].astype(np.int64))}

    def select(self, indices: Sequence[int]) -> "TokenFile":
        """The sequences at these places, as in `datasets`."""
        return self._with_order(self.order[np.asarray(indices, dtype=np.int64)])

    def shuffle(self, seed: int) -> "TokenFile":
        """The sequences in an order that follows from the seed, as in `datasets`."""
        return self._with_order(np.random.default_rng(seed).permutation(self.order))

    def _with_order(self, order: np.ndarray) -> "TokenFile":
        other = object.__new__(TokenFile)
        other.sequences, other.order = self.sequences, order
        return other


def _check_width(ids: np.ndarray, path: str, vocab_size: int) -> None:
    # An even number of ids in a row, so that the two halves of a wider id stay side by side.
    starts = np.linspace(0, max(len(ids) - 1024, 0), SAMPLED_IDS // 1024).astype(np.int64) // 2 * 2
    sample = np.concatenate([ids[start : start + 1024] for start in np.unique(starts)])
    other = "uint32" if ids.dtype == np.uint16 else "uint16"
    if ids.dtype == np.uint16 and len(sample) >= 64 and not sample[1::2].any():
        raise InputError(
            f"data.path: every second id in {path!r}, read as uint16, is 0, as in a file of uint32. Set data.token_dtype: "
            "uint32."
        )
    if sample.max() >= vocab_size:
        raise InputError(
            f"data.path: {path!r}, read as {ids.dtype}, holds id {sample.max()}, but the LM knows {vocab_size}. Set "
            f"data.token_dtype: {other}, or use the tokenizer that it was made with."
        )

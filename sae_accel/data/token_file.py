from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..common.errors import InputError


# Ids that are looked at, spread over the file, to find a wrong width before training does.
SAMPLED_IDS = 2**20
# No vocabulary is as large: a larger id is two narrower ones, read as one.
LARGEST_ID = 2**20


class TokenFile(Dataset):
    """
    Token ids in a file without header, read through memory as they are needed.

    Args:
        path (`str`): The file.
        ctx_len (`int`): Tokens in a sequence; what does not fill a last one is left out.
        vocab_size (`int`): Ids that the LM knows.
        token_dtype (`str`, *optional*): `"uint16"` or `"uint32"`; uint16 if not given and the vocabulary fits in it,
            else uint32.

    Raises:
        `InputError`: if the file is missing, too short, or does not hold ids of that width that the LM knows. Ids that
            are not among those looked at are checked when a sequence is read.
    """

    def __init__(self, path: str, ctx_len: int, vocab_size: int, token_dtype: str | None = None):
        self.path, self.ctx_len, self.vocab_size = path, ctx_len, vocab_size
        self.dtype = np.dtype(token_dtype or ("uint16" if vocab_size <= 2**16 else "uint32"))
        num_ids = self._count_ids()
        if num_ids < ctx_len:
            raise InputError(
                f"data.path: {path!r} holds {num_ids} tokens of {self.dtype}, less than one sequence of "
                f"data.ctx_len = {ctx_len}. Lower it, or use more data."
            )
        self.order = np.arange(num_ids // ctx_len)
        sample = self._sample(num_ids)
        self._check_width(sample)
        self._check_known(sample)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._read(int(self.order[index]) * self.ctx_len, self.ctx_len)
        self._check_known(ids)
        return {"input_ids": torch.from_numpy(ids.astype(np.int64))}

    def select(self, indices: Sequence[int]) -> "TokenFile":
        """The sequences at these places, as in `datasets`."""
        return self._with_order(self.order[np.asarray(indices, dtype=np.int64)])

    def shuffle(self, seed: int) -> "TokenFile":
        """The sequences in an order that follows from the seed, as in `datasets`."""
        return self._with_order(np.random.default_rng(seed).permutation(self.order))

    def _with_order(self, order: np.ndarray) -> "TokenFile":
        other = object.__new__(TokenFile)
        other.__dict__.update(self.__dict__, order=order)
        return other

    def _read(self, start: int, count: int) -> np.ndarray:
        # Mapped anew for each sequence: a map that is kept would be copied whole to every worker of a DataLoader.
        return np.memmap(self.path, self.dtype, "r", offset=start * self.dtype.itemsize, shape=(count,))

    def _count_ids(self) -> int:
        if not Path(self.path).is_file():
            raise InputError(f"data.path: there is no file {self.path!r}.")
        size = Path(self.path).stat().st_size
        if size % self.dtype.itemsize:
            raise InputError(
                f"data.path: {self.path!r} has {size} bytes, which is no whole number of ids of {self.dtype}. Set "
                "data.token_dtype to the width it was written with, or write it anew."
            )
        return size // self.dtype.itemsize

    def _sample(self, num_ids: int) -> np.ndarray:
        length = min(num_ids, 1024)
        # Even starts, so that the two halves of a wider id stay side by side.
        starts = np.linspace(0, num_ids - length, SAMPLED_IDS // 1024).astype(np.int64) // 2 * 2
        ids = self._read(0, num_ids)
        return np.concatenate([ids[start : start + length] for start in np.unique(starts)])

    def _check_width(self, sample: np.ndarray) -> None:
        if self.dtype == np.uint32 and sample.max() > LARGEST_ID:
            raise InputError(
                f"data.path: {self.path!r}, read as uint32, holds id {sample.max()}, as a file of uint16 does. Set "
                "data.token_dtype: uint16."
            )
        # The upper half of an id that the LM knows is at most this, and 0 for a vocabulary that fits in uint16.
        upper_half = (self.vocab_size - 1) >> 16
        if self.dtype == np.uint16 and len(sample) >= 64 and sample[1::2].max() <= upper_half:
            raise InputError(
                f"data.path: every second id in {self.path!r}, read as uint16, is at most {upper_half}, as in a file "
                "of uint32. Set data.token_dtype: uint32."
            )

    def _check_known(self, ids: np.ndarray) -> None:
        if ids.max() >= self.vocab_size:
            raise InputError(
                f"data.path: {self.path!r}, read as {self.dtype}, holds id {ids.max()}, but the LM knows "
                f"{self.vocab_size} ids. Use a file that was made with its tokenizer, or set data.token_dtype to the "
                "width it was written with."
            )

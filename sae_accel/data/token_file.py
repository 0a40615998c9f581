"""
Reads sequences from a file of token ids: numbers of uint16 or uint32, without a header.

The file does not say how wide its ids are or which tokenizer made them, and a wrong guess would train on noise. So a
sample of about a million ids is checked first: read with the wrong width, two ids look like one huge id, or every
second id is almost 0. Then every id is compared with the LM's vocabulary, and sequences with unknown ids are left out.
A sequence is mapped from the disk when it is asked for, and the file is never in memory as a whole.
"""

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..common.errors import InputError
from .bad_rows import BadRows, left_out


# Ids of the sample, spread over the file, that shows a wrong width before training does.
SAMPLED_IDS = 2**20
# Ids that are read at once when every id is checked.
PIECE = 2**24
# No vocabulary has this many ids: a larger id is two narrower ones, read as one.
LARGEST_ID = 2**20


def is_token_file(path: str) -> bool:
    """Whether a path names a file of token ids, by its ending `.bin`; folders and patterns do not."""
    found = Path(path)
    return found.suffix.lower() == ".bin" and not found.is_dir() and (found.exists() or not glob.has_magic(path))


class TokenFile(Dataset):
    """
    The sequences of a file of token ids without a header, read from the disk as they are needed.

    Args:
        path (`str`): The file.
        ctx_len (`int`): Tokens in a sequence. Ids at the end that do not fill a sequence are left out.
        vocab_size (`int`): Ids that the LM knows.
        token_dtype (`str`, *optional*): `"uint16"` or `"uint32"`. If not given, uint16 if the vocabulary fits in it,
            else uint32.
        bad_rows ([`BadRows`], *optional*): Counts the sequences that hold ids which the LM does not know. They are
            left out.

    Raises:
        `InputError`: if the file is missing, too short, or does not hold ids of this width that the LM knows.
    """

    def __init__(
        self,
        path: str,
        ctx_len: int,
        vocab_size: int,
        token_dtype: str | None = None,
        bad_rows: BadRows | None = None,
    ):
        self.path, self.ctx_len, self.vocab_size = path, ctx_len, vocab_size
        self.dtype = np.dtype(token_dtype or ("uint16" if vocab_size <= 2**16 else "uint32"))
        num_ids = self._count_ids()
        if num_ids < ctx_len:
            raise InputError(
                f"data.path: {path!r} holds {num_ids} tokens of {self.dtype}, less than one sequence of "
                f"data.ctx_len = {ctx_len}. Lower data.ctx_len, or use more data."
            )
        self._check_width(self._sample(num_ids))
        known = self._are_known(num_ids // ctx_len)
        self.order = np.flatnonzero(known)
        if len(self.order) < len(known):
            self._leave_out(known, bad_rows or BadRows(whole=True))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._sequences(int(self.order[index]), 1)[0]  # (ctx_len,)
        return {"input_ids": torch.from_numpy(ids.astype(np.int64))}

    def select(self, indices: Sequence[int]) -> "TokenFile":
        """Returns the sequences at these indices, as `datasets` does."""
        return self._with_order(self.order[np.asarray(indices, dtype=np.int64)])

    def shuffle(self, seed: int) -> "TokenFile":
        """Returns the sequences in an order that follows from the seed, as `datasets` does."""
        return self._with_order(np.random.default_rng(seed).permutation(self.order))

    def _with_order(self, order: np.ndarray) -> "TokenFile":
        other = object.__new__(TokenFile)
        other.__dict__.update(self.__dict__, order=order)
        return other

    def _read(self, start: int, count: int) -> np.ndarray:
        # Each sequence has a map of its own: a map that is kept would be copied whole to every worker of a DataLoader.
        return np.memmap(self.path, self.dtype, "r", offset=start * self.dtype.itemsize, shape=(count,))

    def _count_ids(self) -> int:
        if not Path(self.path).is_file():
            raise InputError(f"data.path: there is no file {self.path!r}.")
        size = Path(self.path).stat().st_size
        if size % self.dtype.itemsize:
            raise InputError(
                f"data.path: {self.path!r} has {size} bytes, which is not a whole number of ids of {self.dtype}. Set "
                "--data.token_dtype to the width of the ids that were written, or write the file again."
            )
        return size // self.dtype.itemsize

    def _sample(self, num_ids: int) -> np.ndarray:
        length = min(num_ids, 1024)
        # Starts are even, so that the two halves of a wider id stay side by side.
        starts = np.linspace(0, num_ids - length, SAMPLED_IDS // 1024).astype(np.int64) // 2 * 2
        ids = self._read(0, num_ids)
        return np.concatenate([ids[start : start + length] for start in np.unique(starts)])

    def _check_width(self, sample: np.ndarray) -> None:
        if self.dtype == np.uint32 and sample.max() > LARGEST_ID:
            raise InputError(
                f"data.path: {self.path!r}, read as uint32, holds id {sample.max()}, as a file of uint16 does. Set "
                "--data.token_dtype uint16."
            )
        # The upper half of an id that the LM knows is at most this, and 0 for a vocabulary that fits in uint16.
        upper_half = (self.vocab_size - 1) >> 16
        if self.dtype == np.uint16 and len(sample) >= 64 and sample[1::2].max() <= upper_half:
            raise InputError(
                f"data.path: every second id in {self.path!r}, read as uint16, is at most {upper_half}, as in a file "
                "of uint32. Set --data.token_dtype uint32."
            )

    def _are_known(self, count: int) -> np.ndarray:
        """Returns whether the LM knows every id of each sequence, `(count,)`."""
        known = np.ones(count, bool)
        if self.vocab_size > np.iinfo(self.dtype).max:
            return known
        rows = max(1, PIECE // self.ctx_len)
        with tqdm(total=count, desc="Looking at every id", unit=" sequences", unit_scale=True, delay=2.0) as bar:
            for start in range(0, count, rows):
                piece = self._sequences(start, min(rows, count - start))
                known[start : start + rows] = piece.max(1) < self.vocab_size
                bar.update(len(piece))
        return known

    def _leave_out(self, known: np.ndarray, bad_rows: BadRows) -> None:
        unknown = np.flatnonzero(~known)
        if 2 * len(unknown) > len(known):
            raise InputError(
                f"data.path: {self.path!r}, read as {self.dtype}, {self._what_is_unknown(unknown[:1000])}. Use a file "
                "that the LM's tokenizer made, or set --data.token_dtype to the width of the ids that were written."
            )
        why = f"which {self._what_is_unknown(unknown[:1])}"
        bad_rows.add(left_out([(int(place), why) for place in unknown], 0, len(known)))
        bad_rows.tell()

    def _what_is_unknown(self, places: np.ndarray) -> str:
        largest = max(self._sequences(int(place), 1).max() for place in places)
        return f"holds id {largest}, but the LM knows {self.vocab_size} ids"

    def _sequences(self, start: int, count: int) -> np.ndarray:
        """Returns `count` sequences of the file, `(count, ctx_len)`."""
        return self._read(start * self.ctx_len, count * self.ctx_len).reshape(count, self.ctx_len)

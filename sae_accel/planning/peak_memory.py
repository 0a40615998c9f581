"""
Counts the peak memory of code that runs on fake tensors.

Torch calls `__torch_dispatch__` for each operation. The counter adds the bytes of each new storage, and subtracts them
when Python frees it.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Private to torch, like the fake tensors it is used with; tests/planning/test_memory.py counts bytes by it.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """
    Counts the bytes of the tensors that code makes while this is open. It works on fake tensors, which take no memory.

    A fake tensor has no value. If the code asks for one, the answer is 1, as if every token counted.

    Args:
        known (`Iterable[torch.Tensor]`): Tensors that do not count.

    Attributes:
        live (`int`): Bytes of all tensors that exist now.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self._peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def of(self, work: Callable[[], object]) -> int:
        """Runs `work`, and returns the highest number of live bytes during it, including tensors made before."""
        self._peak = self.live
        work()
        return self._peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops.aten.index.Tensor and _is_mask(args[1]):
            # (..., width) becomes (tokens, width), with every token kept.
            result = args[0].flatten(0, args[1][0].ndim - 1).clone()
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.live += storage.nbytes()
        self._peak = max(self._peak, self.live)
        weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())

    def _let_go(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.live -= size


def _is_mask(indices: list[Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool

"""Count the bytes of live tensors while code runs: the same number on the CPU, a GPU and the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """`with PeakMemory(*known) as counter: ...` then `counter.peak` bytes; tensors in `known` are not counted.

    Counts what tensors hold (storages made inside the block), not the scratch space of a kernel.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.peak = 0
        self.where = ""
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        total = sum(size for _, size in self._live.values())
        if total > self.peak:
            self.peak, self.where = total, str(func)
        return out

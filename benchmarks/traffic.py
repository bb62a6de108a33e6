"""Count the bytes that operations read and write, as eager PyTorch runs them: the same number on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Views under another name, and memory that nothing is written to.
_FREE = (torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_strided)

# The first argument is only written to, or only tells a shape.
_OVERWRITES = (torch.ops.aten.copy_, torch.ops.aten.zero_, torch.ops.aten.new_zeros)


class Traffic(TorchDispatchMode):
    """`with Traffic() as traffic: ...`, then `traffic.bytes`, and `traffic.by_operation` in the order of first use.

    An operation reads each of its inputs once and writes each of its outputs once; views are free. What a kernel reads
    again, or keeps in a cache, is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.by_operation.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not (func.is_view or func.overloadpacket in _FREE):
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            given = {key: value for key, value in kwargs.items() if key != "out"}  # written, not read
            read = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
            if func.overloadpacket in _OVERWRITES:
                read = read[1:]
            name = str(func.overloadpacket).removeprefix("aten.")
            moved = sum(map(_size, read)) + sum(map(_size, written))
            self.by_operation[name] = self.by_operation.get(name, 0) + moved
        return out


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; a broadcast one has fewer in memory."""
    stored = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        stored *= size if stride else 1
    return stored * tensor.element_size()

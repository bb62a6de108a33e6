"""MODELs of ComfyUI-GGUF, without importing it: core's networks on layers with packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..host import Patcher
from ..overlay import OverlayPatcher
from .core import Core

PATCHER = "GGUFModelPatcher"  # by name: two node packs have it


class PackedPatcher(OverlayPatcher):
    """An overlay on packed weights."""

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> list:
        """ValueError: core would read the packed bytes as weights."""
        raise ValueError(
            "LoRA hooks cannot change a GGUF model's packed weights. Load it with an ordinary LoRA loader, or "
            "use an fp8 or 16-bit file of the base."
        )


class GGUF(Core):
    """ComfyUI-GGUF."""

    order = 1
    patcher = PackedPatcher

    def recognises(self, model: Patcher) -> bool:
        return type(model).__name__ == PATCHER

    def values(self, layer: torch.nn.Module, weight: Any) -> tuple[Tensor, float] | None:
        """Unpacked by the layer itself, as in each forward call."""
        unpack = getattr(layer, "get_weight", None)
        if unpack is None or getattr(weight, "tensor_shape", None) is None:
            return super().values(layer, weight)
        values = unpack(weight, torch.float32)
        return values, 8 * weight.untyped_storage().nbytes() / values.numel()


HOST = GGUF()

"""float64, which MPS, DirectML and some XPU devices do not have."""

from __future__ import annotations

from torch import Tensor

DEVICES = ("cpu", "cuda", "meta")  # that compute in float64


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor where it is if that device computes in float64, else on the CPU."""
    return tensor if tensor.device.type in DEVICES else tensor.cpu()

# N tokens
"""Faster float32 Linear layers on x86 CPUs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# With fewer weights than this the call itself takes longer than the multiplication.
SMALLEST = 1 << 14


class _OneDNN(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _fits(*args):
            bias = args[2] if len(args) > 2 else None
            return torch.ops.mkldnn._linear_pointwise(args[0], args[1], bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    parts = [weight] if bias is None else [weight, bias]
    return (
        all(type(part) in (Tensor, torch.nn.Parameter) for part in (x, *parts))
        and all(part.device.type == "cpu" and part.dtype == torch.float32 for part in (x, *parts))
        and all(part.is_contiguous() for part in parts)  # the call assumes a contiguous bias
        and weight.numel() >= SMALLEST
        and x.numel() > x.shape[-1]  # a single row is as fast either way
    )


def onednn_linear(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within this context, Linear layers on float32 tensors on an x86 CPU run through oneDNN.

    torch uses MKL, which takes about twice as long on AMD CPUs (EPYC: 92 against 186 GFLOPS per thread). The order of
    summation differs, so results agree to float32 rounding. Does nothing when `x`, the network's input, has another
    dtype or device, when gradients are enabled, and under torch.compile.
    """
    usable = (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    return _OneDNN() if usable else contextlib.nullcontext()

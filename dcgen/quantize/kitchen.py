"""comfy-kitchen as the engine, where it is installed: its kernels for GPUs, and the same values.

The package is ComfyUI's own; `pip install comfy-kitchen` brings it into another environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from .formats import Format, Parts

PACKAGE = "comfy_kitchen"
# Our name of a format -> (the layout, its options besides the size of the rotation).
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "w6a8": ("AsymW4A8Int8Layout", {"bits": 6}),
    "w4a8": ("AsymW4A8Int8Layout", {}),
    "fp8": ("TensorCoreFP8Layout", {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
}


def version() -> str:
    """The installed version; "" when there is none."""
    installed = importlib.util.find_spec(PACKAGE) is not None
    return importlib.metadata.version(PACKAGE) if installed else ""


def knows(fmt: Format) -> bool:
    """Whether the installed version, if any, has this format."""
    if fmt.name not in LAYOUTS or not version():
        return False
    layout, options = _layout(fmt)
    return layout is not None and set(options) <= set(inspect.signature(layout.quantize).parameters)


def quantize(fmt: Format, weight: Tensor) -> Parts:
    """As Format.quantize, with the whole weight in float32.

    A weight of zeros is left to the format: comfy-kitchen divides by its largest value.
    """
    if not weight.any():
        return fmt.quantize(weight)
    from comfy_kitchen.tensor import QuantizedTensor

    layout, options = _layout(fmt)
    sizes = {key: value for key, value in fmt.fields(tuple(weight.shape)).items() if key == "convrot_groupsize"}
    stored = QuantizedTensor.from_float(weight.float(), layout.__name__, **options, **sizes).state_dict("weight")
    return {name: _as_written(tensor) for name, tensor in stored.items()}


def _layout(fmt: Format) -> tuple[Any, dict[str, Any]]:
    from comfy_kitchen import tensor

    name, options = LAYOUTS[fmt.name]
    return getattr(tensor, name, None), options


def _as_written(tensor: Tensor) -> Tensor:
    """Scales that are powers of two as bytes: ComfyUI's reader under dynamic VRAM does not know their type."""
    return tensor.view(torch.uint8) if "e8m0" in str(tensor.dtype) else tensor

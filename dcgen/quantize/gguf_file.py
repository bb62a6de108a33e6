# N outputs, K inputs
"""GGUF files, as ComfyUI-GGUF reads them: a base, or DC-Gen's merged blocks in its shape (dcgen.merge.split).

The formats and the file are those of the `gguf` package (`pip install gguf`), which is needed only here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import Entry, replacing
from ..release import Model
from .formats import Format, Parts
from .plan import Unit
from .write import QUANTIZATION_KEY, Progress, check_base_latent, checked_plan, description, finite

SUFFIX = ".gguf"
BLOCK = 32  # inputs that share a scale, in all formats here
# Kept tensors: the type of the file for a dtype. Vectors are always F32, as the readers expect.
UNQUANTIZED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ARRAYS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
}  # all other types are bytes


class Gguf(Format):
    """One of llama.cpp's formats of blocks of 32 inputs."""

    noted = False

    def __init__(self, core: str, bits: int):
        self.name, self.core, self.bits = f"gguf-{core.lower()}", core, bits  # type: ignore[misc]

    def careful_format(self) -> Format:
        return GGUF_FORMATS["gguf-q8_0"]

    def check(self, shape: tuple[int, ...]) -> None:
        if shape[1] % BLOCK:
            raise ValueError(f"its {shape[1]} inputs are not a multiple of {BLOCK}")

    def entries(self, shape: tuple[int, ...]) -> list[Entry]:
        package = gguf_package()
        size = package.quants.quant_shape_to_byte_shape(shape, package.GGMLQuantizationType[self.core])
        return [Entry("weight", torch.uint8, tuple(size))]

    def quantize(self, weight: Tensor) -> Parts:
        package = gguf_package()
        stored = package.quants.quantize(weight.cpu().numpy(), package.GGMLQuantizationType[self.core])
        return {"weight": torch.from_numpy(stored)}

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        package = gguf_package()
        values = package.quants.dequantize(parts["weight"].numpy(), package.GGMLQuantizationType[self.core])
        return torch.from_numpy(values).reshape(shape)


_FORMATS = [Gguf(core, bits) for core, bits in (("Q8_0", 8), ("Q5_1", 5), ("Q5_0", 5), ("Q4_1", 4), ("Q4_0", 4))]
GGUF_FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _FORMATS}


def gguf_package() -> Any:
    """The gguf package; ValueError when it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"GGUF files need the package gguf: pip install gguf ({error})") from error
    return gguf


def write_gguf(
    model: Model,
    out: str | os.PathLike[str],
    fmt: Format,
    *,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Write the model as quantize_model does, to a GGUF file with the base's key names.

    ValueError, too, when the model is not in the shape of the family's base, which is all that loaders of GGUF know.
    """
    package, out = gguf_package(), Path(out)
    if out.suffix != SUFFIX:
        raise ValueError(f"{out}: the result is a GGUF file; give it the ending {SUFFIX}")
    check_shape(model)
    units = checked_plan(model, fmt, keep)
    with replacing(out) as temporary:
        writer = package.GGUFWriter(temporary, model.backbone.gguf_architecture)
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
        writer.add_string(QUANTIZATION_KEY, json.dumps(description(model, fmt, units, keep)))
        for unit in units:
            kind, dtype, shape = _stored(unit)
            size = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(unit.entry.name, shape, dtype, size, package.GGMLQuantizationType[kind])
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in _arrays(model, units, progress):
            writer.write_tensor_data(array)
        writer.close()
    return out


def check_shape(model: Model) -> None:
    """ValueError unless loaders of GGUF files know the model: a base, or blocks in its shape."""
    if not model.backbone.gguf_architecture:
        raise ValueError(f"{model.tensors.path}: no loader of GGUF files reads a {model.backbone.title} model")
    check_base_latent(model, "loaders of GGUF files")


def _stored(unit: Unit) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    """(type in the file, dtype and shape of the array that is written) of a tensor."""
    if unit.stored is not None:
        return unit.stored.format.core, np.dtype(np.uint8), unit.written[0].shape
    shape = unit.entry.shape
    kind = UNQUANTIZED.get(unit.entry.dtype, "F32") if len(shape) > 1 else "F32"
    return (kind, ARRAYS[kind], shape) if kind in ARRAYS else (kind, np.dtype(np.uint8), (*shape[:-1], 2 * shape[-1]))


def _arrays(model: Model, units: Sequence[Unit], progress: Progress | None) -> Iterator[np.ndarray[Any, Any]]:
    for number, unit in enumerate(units):
        if progress:
            progress(number, len(units), unit.entry.name)
        tensor = finite(unit, model)
        if unit.stored is not None:
            tensor = unit.stored.format.quantize(tensor.reshape(unit.matrix).float())["weight"]
        elif _stored(unit)[0] == "F32":
            tensor = tensor.float()
        elif tensor.dtype == torch.bfloat16:  # numpy has no such type
            tensor = tensor.contiguous().view(torch.uint8)
        yield tensor.contiguous().numpy()

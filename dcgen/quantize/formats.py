# N outputs, K inputs
"""The formats of quantized Linear layers that ComfyUI reads: what each stores, and how it is computed.

A layer is stored as several tensors beside its bias, and as JSON (`comfy_quant`) that names the format. Each format's
tensors equal those of comfy-kitchen (https://github.com/Comfy-Org/comfy-kitchen, Apache-2.0) bit for bit.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..files import Entry
from . import floating, integer

NOTE = "comfy_quant"
ROW_VALUES = 1 << 22  # values of a weight that are computed at a time

Parts = dict[str, Tensor]
"""The tensors of a layer, by the end of their names: "weight", "weight_scale", ..."""


class Format(ABC):
    """One format of a weight (N,K), always computed in float32."""

    name: ClassVar[str]
    """As the command calls it."""
    core: ClassVar[str]
    """As ComfyUI calls it."""
    bits: ClassVar[int]
    """Of a value, without scales."""
    noted: ClassVar[bool] = True
    """Whether a layer has JSON that names the format."""
    careful: ClassVar[str] = ""
    """Name of the format of layers that are too sensitive for this one; "" = this one."""

    @abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """ValueError unless a weight of this shape can be stored."""

    @abstractmethod
    def entries(self, shape: tuple[int, ...]) -> list[Entry]:
        """The tensors that store a weight of this shape."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> Parts:
        """The tensors that store a weight (N,K) of finite values, of any floating dtype."""

    @abstractmethod
    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The stored weight of this shape, float32."""

    def careful_format(self) -> Format:
        """The format of layers that are too sensitive for this one."""
        return FORMATS[self.careful] if self.careful else self

    def fields(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Fields of the JSON besides the format and full_precision_matrix_mult."""
        return {}

    def note(self, shape: tuple[int, ...], exact: bool) -> Tensor:
        """The JSON of a layer, uint8. exact: the layer multiplies with the dequantized weight, its inputs as they are.

        Otherwise its inputs are quantized too where the hardware multiplies in the format.
        """
        entry = {"format": self.core, **self.fields(shape)}
        if exact:
            entry["full_precision_matrix_mult"] = True
        return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def _by_rows(weight: Tensor) -> Iterator[Tensor]:
    """Some rows at a time in float32, so that the whole weight never is."""
    for rows in torch.split(weight, max(1, ROW_VALUES // weight.shape[1])):
        yield rows.float()


def _joined(parts: list[Parts]) -> Parts:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Int8(Format):
    """8-bit integers with one scale per row, after a ConvRot rotation."""

    name = "int8"
    core = "int8_tensorwise"
    bits = 8

    def check(self, shape: tuple[int, ...]) -> None:
        integer.rotation_size(shape[1])

    def fields(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"convrot": True, "convrot_groupsize": integer.rotation_size(shape[1])}

    def entries(self, shape: tuple[int, ...]) -> list[Entry]:
        N, K = shape
        return [Entry("weight", torch.int8, (N, K)), Entry("weight_scale", torch.float32, (N, 1))]

    def quantize(self, weight: Tensor) -> Parts:
        return _joined([integer.quantize_rows(integer.rotated(rows)) for rows in _by_rows(weight)])

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return integer.rotated(parts["weight"].float() * parts["weight_scale"])


class Grouped(Format):
    """4- or 6-bit codes with a scale per 16 inputs and per row, after a ConvRot rotation; multiplied as 8-bit integers.

    4-bit codes are indices into a table of 16 levels, 6-bit codes are evenly spaced.
    """

    core = "asym_w4a8_int8"
    careful = "int8"

    def check(self, shape: tuple[int, ...]) -> None:
        integer.rotation_size(shape[1])
        multiple = 16 if self.bits == 4 else 32
        if shape[1] % multiple:
            raise ValueError(f"its {shape[1]} inputs are not a multiple of {multiple}")

    def fields(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"group_size": integer.GROUP, "convrot_groupsize": integer.rotation_size(shape[1])}

    def entries(self, shape: tuple[int, ...]) -> list[Entry]:
        N, K = shape
        entries = [
            Entry("weight", torch.int8, (N, K * self.bits // 8)),
            Entry("weight_s_rel", torch.float8_e4m3fn, (N, K // integer.GROUP)),
            Entry("weight_s_channel", torch.float32, (N,)),
        ]
        return entries + ([Entry("weight_codebook", torch.float32, (16,))] if self.bits == 4 else [])

    def quantize(self, weight: Tensor) -> Parts:
        table = integer.codebook(weight) if self.bits == 4 else integer.EVEN_LEVELS.to(weight.device)
        parts = _joined([integer.quantize_groups(integer.rotated(rows), table) for rows in _by_rows(weight)])
        return parts | ({"weight_codebook": table} if self.bits == 4 else {})

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return integer.rotated(integer.dequantize_groups(parts, shape[1]))


class W4A8(Grouped):
    """4-bit weights, 8-bit inputs."""

    name = "w4a8"
    bits = 4


class W6A8(Grouped):
    """6-bit weights, 8-bit inputs."""

    name = "w6a8"
    bits = 6


class Fp8(Format):
    """float8_e4m3fn with one scale per tensor."""

    name = "fp8"
    core = "float8_e4m3fn"
    bits = 8

    def check(self, shape: tuple[int, ...]) -> None:
        """Any shape can be stored."""

    def entries(self, shape: tuple[int, ...]) -> list[Entry]:
        return [Entry("weight", torch.float8_e4m3fn, shape), Entry("weight_scale", torch.float32, ())]

    def quantize(self, weight: Tensor) -> Parts:
        scale = floating.tensor_scale(weight, floating.E4M3_MAX)
        rows = [floating.to_e4m3(rows * (1.0 / scale)) for rows in _by_rows(weight)]
        return {"weight": torch.cat(rows), "weight_scale": scale}

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return parts["weight"].float() * parts["weight_scale"]


class MxFp8(Format):
    """float8_e4m3fn with a power of two as the scale of each 32 inputs (OCP Microscaling Formats)."""

    name = "mxfp8"
    core = "mxfp8"
    bits = 8

    def check(self, shape: tuple[int, ...]) -> None:
        floating.check_blocks(shape, floating.MX_BLOCK)

    def entries(self, shape: tuple[int, ...]) -> list[Entry]:
        N, K = floating.padded(shape, floating.MX_BLOCK)
        scales = floating.tiled_shape(N, K // floating.MX_BLOCK)
        return [Entry("weight", torch.float8_e4m3fn, (N, K)), Entry("weight_scale", torch.uint8, scales)]

    def quantize(self, weight: Tensor) -> Parts:
        parts = [floating.quantize_mx(rows) for rows in _by_rows(floating.with_rows(weight, floating.MX_BLOCK))]
        values, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"weight": values, "weight_scale": floating.tiled(scales)}

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        values = parts["weight"]
        scales = floating.untiled(parts["weight_scale"], len(values), values.shape[1] // floating.MX_BLOCK)
        return floating.dequantize_mx(values, scales)[: shape[0]]


class NvFp4(Format):
    """4-bit floats (e2m1) with a float8_e4m3fn scale for each 16 inputs, and one scale per tensor."""

    name = "nvfp4"
    core = "nvfp4"
    bits = 4
    careful = "fp8"

    def check(self, shape: tuple[int, ...]) -> None:
        floating.check_blocks(shape, floating.NV_BLOCK)

    def entries(self, shape: tuple[int, ...]) -> list[Entry]:
        N, K = floating.padded(shape, floating.NV_BLOCK)
        return [
            Entry("weight", torch.uint8, (N, K // 2)),
            Entry("weight_scale", torch.float8_e4m3fn, floating.tiled_shape(N, K // floating.NV_BLOCK)),
            Entry("weight_scale_2", torch.float32, ()),
        ]

    def quantize(self, weight: Tensor) -> Parts:
        scale = floating.tensor_scale(weight, floating.E4M3_MAX * floating.E2M1_MAX)
        weight = floating.with_rows(weight, floating.NV_BLOCK)
        parts = [floating.quantize_nv(rows, scale) for rows in _by_rows(weight)]
        values, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"weight": values, "weight_scale": floating.tiled(scales), "weight_scale_2": scale}

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        values = parts["weight"]
        scales = floating.untiled(parts["weight_scale"], len(values), values.shape[1] * 2 // floating.NV_BLOCK)
        return floating.dequantize_nv(values, scales, parts["weight_scale_2"])[: shape[0]]


FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int8(), W6A8(), W4A8(), Fp8(), MxFp8(), NvFp4())}


@dataclass(frozen=True)
class Stored:
    """How one layer is stored. exact: see Format.note."""

    format: Format
    exact: bool = False

    def entries(self, layer: str, shape: tuple[int, ...]) -> list[Entry]:
        """All tensors of the layer's weight, by full name."""
        entries = self.format.entries(shape)
        if self.format.noted:
            note = self.format.note(shape, self.exact)
            entries = [*entries, Entry(NOTE, note.dtype, tuple(note.shape))]
        return [Entry(f"{layer}.{entry.name}", entry.dtype, entry.shape) for entry in entries]

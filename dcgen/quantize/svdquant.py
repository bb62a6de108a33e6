# N outputs, K inputs, R rank, S parts of a modulation layer
"""SVDQuant (arXiv:2411.05007) in the layout of nunchaku's files: a low-rank branch in 16 bits beside 4-bit weights.

A weight W becomes up @ down + residual / smooth, where the residual is of W * smooth, after the R largest singular
directions are taken out of it, and stored as int4 (a scale per 64 inputs) or nvfp4 (per 16 inputs and per tensor). The
layer's 4-bit inputs are divided by `smooth` before they are rounded, which moves their outliers into the weight.
Modulation layers are int4 without a branch, and their inputs are not rounded. Nothing here was run by nunchaku's own
kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ..extract import leading_svd
from ..files import Entry
from . import packing
from .floating import E2M1, E2M1_LIMITS, E2M1_MAX, E4M3_MAX
from .packing import TILE, up_to

DTYPE = torch.bfloat16
INT4_MAX, INT4_GROUP, FP4_GROUP = 7, 64, 16
# Added to the output of a GELU by the int4 kernels, which is at least -0.17, so that it can be stored without a sign.
SHIFT = 0.171875
ZERO = 7  # the code of zero in modulation layers
SMOOTHING = 0.5  # the share of an outlier that goes into the weight
DEFAULT_RANK = 32
SVDQUANT_FORMATS = ("svdquant-int4", "svdquant-nvfp4")

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class SvdQuant:
    """One of nunchaku's two formats, and the rank of the branch."""

    fp4: bool
    rank: int = DEFAULT_RANK

    @property
    def name(self) -> str:
        return SVDQUANT_FORMATS[self.fp4]

    @property
    def group(self) -> int:
        return FP4_GROUP if self.fp4 else INT4_GROUP

    def check(self, shape: tuple[int, int]) -> None:
        """ValueError unless a weight (N,K) can be stored."""
        if shape[1] % INT4_GROUP:
            raise ValueError(f"its {shape[1]} inputs are not a multiple of {INT4_GROUP}")
        if self.rank % 16 or not 0 < self.rank <= min(shape):
            raise ValueError(f"rank {self.rank} is not a multiple of 16 up to {min(shape)}")

    def entries(self, shape: tuple[int, int], joined: bool) -> list[Entry]:
        """The tensors of a layer with a weight (N,K). joined: of several layers, each with a scale of its own."""
        N, K = (up_to(size, TILE) for size in shape)
        if not self.fp4:
            scales = [Entry("wscales", DTYPE, (K // INT4_GROUP, N))]
        else:
            whole = Entry("wcscales", DTYPE, (N,)) if joined else Entry("wtscale", DTYPE, (1,))
            scales = [whole, Entry("wscales", torch.float8_e4m3fn, (K // FP4_GROUP, N))]
        vectors = [Entry(name, DTYPE, (size,)) for name, size in (("bias", N), ("smooth", K), ("smooth_orig", K))]
        branch = [Entry("lora_down", DTYPE, (K, self.rank)), Entry("lora_up", DTYPE, (N, self.rank))]
        return [Entry("qweight", torch.int8, (N, K // 2)), *scales, *vectors, *branch]

    def quantize(
        self, weights: list[Tensor], bias: Tensor | None, *, smooth: Tensor | None = None, shifted: bool = False
    ) -> Parts:
        """The packed tensors of layers (N_i,K) that are joined along their outputs.

        smooth: (K,) divisors of the inputs, None = 1; shifted: the int4 kernel adds SHIFT to the inputs.
        """
        weight = torch.cat(weights).float()
        smooth = (torch.ones(weight.shape[1]) if smooth is None else smooth).to(weight.device, DTYPE)
        down, up = low_rank(weight * smooth.float(), self.rank)
        residual = weight * smooth.float() - up.float() @ down.float()
        down = (down.float() / smooth.float()).to(DTYPE)
        if self.fp4:
            codes, scales = fp4_residual(residual, [len(part) for part in weights])
        else:
            codes, scales = int4_residual(residual)
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias.float()
        if shifted and not self.fp4:
            # The kernel computes residual @ (x + SHIFT) / smooth, but the branch of x.
            stored = _scaled(_signed(codes), scales["wscales"].float())
            bias = bias - (stored / smooth.float()).sum(dim=1) * SHIFT
        return self._packed(codes, scales, bias, smooth, down, up)

    def _packed(self, codes: Tensor, scales: Parts, bias: Tensor, smooth: Tensor, down: Tensor, up: Tensor) -> Parts:
        N, K = (up_to(size, TILE) for size in codes.shape)
        parts = {"qweight": packing.packed_codes(packing.padded(codes, TILE, TILE))}
        for name, scale in scales.items():
            if name == "wscales" and self.fp4:
                bits = packing.padded(scale.view(torch.uint8), TILE, TILE // FP4_GROUP, value=_ONE_E4M3)
                parts[name] = packing.packed_micro_scales(bits.view(scale.dtype))
            elif name == "wscales":
                parts[name] = packing.packed_scales(packing.padded(scale, TILE, TILE // INT4_GROUP, value=1))
            else:
                parts[name] = scale if len(scale) == 1 else _vector(scale, N, 1)
        parts["bias"] = _vector(bias.to(DTYPE), N, 1)
        parts["smooth"] = _vector(smooth, K, 1)
        parts["smooth_orig"] = parts["smooth"].clone()
        parts["lora_down"] = packing.packed_down(packing.padded(down, 16, TILE))
        parts["lora_up"] = packing.packed_up(packing.padded(up, TILE, 16))
        return parts

    def dequantize(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight (N,K) that the stored tensors stand for, float32."""
        N, K = shape
        codes = packing.unpacked_codes(parts["qweight"])
        if self.fp4:
            table = torch.tensor([*E2M1, *(-value for value in E2M1)])
            scales = packing.unpacked_micro_scales(parts["wscales"]).float()
            whole = parts["wtscale"] if "wtscale" in parts else packing.unpacked_vector(parts["wcscales"])[:, None]
            values = _scaled(table[codes.int()], scales) * whole.float()
        else:
            values = _scaled(_signed(codes), packing.unpacked_scales(parts["wscales"]).float())
        smooth = packing.unpacked_vector(parts["smooth"]).float()
        branch = packing.unpacked_up(parts["lora_up"]).float() @ packing.unpacked_down(parts["lora_down"]).float()
        return (values / smooth + branch)[:N, :K]

    def bias(self, parts: Mapping[str, Tensor], shape: tuple[int, int], shifted: bool) -> Tensor:
        """(N,) float32 bias of the layer without the kernel's shift."""
        bias = packing.unpacked_vector(parts["bias"]).float()[: shape[0]]
        if shifted and not self.fp4:
            branch = packing.unpacked_up(parts["lora_up"]).float() @ packing.unpacked_down(parts["lora_down"]).float()
            residual = self.dequantize(parts, shape) - branch[: shape[0], : shape[1]]
            bias = bias + residual.sum(dim=1) * SHIFT
        return bias


_ONE_E4M3 = 0x38


def _vector(values: Tensor, size: int, fill: float) -> Tensor:
    return packing.packed_vector(packing.padded(values[:, None], size, 1, value=fill)[:, 0])


def _signed(codes: Tensor) -> Tensor:
    """float32 values of 4-bit codes in two's complement."""
    return ((codes.to(torch.int8) ^ 8) - 8).float()


def _scaled(values: Tensor, scales: Tensor) -> Tensor:
    groups = rearrange(values, "n (g k) -> n g k", g=scales.shape[1])
    return rearrange(groups * scales[..., None], "n g k -> n (g k)")


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down (R,K), up (N,R)) in bfloat16 of the R largest singular directions of a weight (N,K)."""
    U, S, V = leading_svd(weight, rank)
    root = S[:rank].sqrt()
    return (root[:, None] * V[:, :rank].T).to(DTYPE), (U[:, :rank] * root).to(DTYPE)


def smoothing(largest_input: Tensor, weights: list[Tensor]) -> Tensor:
    """(K,) divisors of the inputs, from the largest magnitude of each input over calibration data (K,).

    max|x|^a / max|W|^(1-a) as in SmoothQuant, arXiv:2211.10438 Eq. 4, with a = 1/2.
    """
    largest_weight = torch.cat(weights).float().abs().amax(dim=0)
    scale = largest_input.float().clamp(min=1e-5) ** SMOOTHING / largest_weight.clamp(min=1e-5) ** (1 - SMOOTHING)
    return scale / scale.log().mean().exp()


def int4_residual(residual: Tensor) -> tuple[Tensor, Parts]:
    """(codes (N,K) uint8 in two's complement, {"wscales": (N,K/64)})."""
    groups = rearrange(residual, "n (g k) -> n g k", k=INT4_GROUP)
    scale = (groups.abs().amax(dim=-1) / INT4_MAX).clamp(min=1e-8).to(DTYPE)
    codes = (groups / scale.float()[..., None]).round_().clamp_(-8, INT4_MAX)
    return rearrange(codes.to(torch.int8), "n g k -> n (g k)").view(torch.uint8) & 0xF, {"wscales": scale}


def fp4_residual(residual: Tensor, rows: list[int]) -> tuple[Tensor, Parts]:
    """(codes (N,K) uint8, scales): "wtscale" (1,), or "wcscales" (N,) for several parts of these rows; "wscales"."""
    whole = [(part.abs().amax() / (E2M1_MAX * E4M3_MAX)).clamp(min=1e-12).to(DTYPE) for part in residual.split(rows)]
    per_row = torch.cat([scale.expand(count) for scale, count in zip(whole, rows, strict=True)])
    groups = rearrange(residual / per_row.float()[:, None], "n (g k) -> n g k", k=FP4_GROUP)
    scale = (groups.abs().amax(dim=-1) / E2M1_MAX).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    divisor = torch.where(scale.float() == 0, 1.0, scale.float())
    codes = rearrange(nearest_e2m1(groups / divisor[..., None]), "n g k -> n (g k)")
    name = "wtscale" if len(rows) == 1 else "wcscales"
    return codes, {name: whole[0][None] if len(rows) == 1 else per_row, "wscales": scale}


def nearest_e2m1(values: Tensor) -> Tensor:
    """Codes (uint8) of the nearest e2m1 values, the smaller of two that are as near, zero without a sign."""
    size = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for limit in E2M1_LIMITS:
        codes += size > limit
    return codes | (((values < 0) & (codes > 0)).to(torch.uint8) << 3)


# Modulation layers ------------------------------------------------------------------------------------------------


def modulation_entries(shape: tuple[int, int]) -> list[Entry]:
    """The tensors of a modulation layer (N,K)."""
    N, K = shape
    groups = up_to(K // INT4_GROUP, 16)
    scales = [Entry(name, DTYPE, (groups, N)) for name in ("wscales", "wzeros")]
    return [Entry("qweight", torch.int32, (N // 4, K // 2)), *scales, Entry("bias", DTYPE, (N,))]


def quantize_modulation(weight: Tensor, bias: Tensor, splits: int) -> Parts:
    """The tensors of a modulation layer (N,K) with S = `splits` outputs per channel, which nunchaku interleaves.

    Its kernels multiply by scale where the model multiplies by 1 + scale: the 1 goes into the bias.
    """
    weight = rearrange(weight.float(), "(s n) k -> (n s) k", s=splits)
    bias = rearrange(bias.float() + _ones(bias, splits), "(s n) -> (n s)", s=splits).to(DTYPE)
    groups = rearrange(weight, "n (g k) -> n g k", k=INT4_GROUP)
    scale = (groups.abs().amax(dim=-1) / INT4_MAX).clamp(min=1e-8).to(DTYPE)
    step = scale.float()[..., None]
    codes = ((groups + ZERO * step) / step).round_().clamp_(0, 15).to(torch.uint8)
    missing = up_to(scale.shape[1], 16) - scale.shape[1]
    scales = torch.nn.functional.pad(scale.T, (0, 0, 0, missing)).contiguous()
    packed = packing.packed_modulation(rearrange(codes, "n g k -> n (g k)"))
    return {"qweight": packed, "wscales": scales, "wzeros": -ZERO * scales, "bias": bias}


def dequantize_modulation(parts: Mapping[str, Tensor], splits: int) -> tuple[Tensor, Tensor]:
    """(weight (N,K), bias (N,)) float32 of quantize_modulation."""
    codes = packing.unpacked_modulation(parts["qweight"])
    groups = codes.shape[1] // INT4_GROUP
    scale, zero = (parts[name][:groups].T.float()[..., None] for name in ("wscales", "wzeros"))
    weight = rearrange(rearrange(codes.float(), "n (g k) -> n g k", g=groups) * scale + zero, "n g k -> n (g k)")
    bias = rearrange(parts["bias"].float(), "(n s) -> (s n)", s=splits)
    return rearrange(weight, "(n s) k -> (s n) k", s=splits), bias - _ones(bias, splits)


def _ones(bias: Tensor, splits: int) -> Tensor:
    """1 at the outputs that are scales: shift, scale, gate for one or for both halves of a block."""
    scales = torch.zeros(splits, device=bias.device)
    scales[1], scales[-2] = 1, 1
    return scales.repeat_interleave(len(bias) // splits)

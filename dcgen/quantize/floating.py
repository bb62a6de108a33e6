# N outputs, K inputs
"""Floating-point formats: fp8 (e4m3) with a scale per tensor or per block, and 4-bit floats (e2m1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

E4M3_MAX, E2M1_MAX = 448.0, 6.0
MX_BLOCK, NV_BLOCK = 32, 16
E8M0_BIAS = 127
# Magnitudes of e2m1 by code, and the limits between them; a limit itself belongs to the even code of the two.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LIMITS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def check_blocks(shape: tuple[int, ...], block: int) -> None:
    """ValueError unless the inputs are whole blocks."""
    if shape[1] % block:
        raise ValueError(f"its {shape[1]} inputs are not a multiple of {block}")


def padded(shape: tuple[int, ...], rows: int) -> tuple[int, int]:
    """The shape with a multiple of `rows` outputs."""
    return -(-shape[0] // rows) * rows, shape[1]


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """The weight with rows of zeros up to a multiple of `rows`, as the kernels need them."""
    missing = padded(tuple(weight.shape), rows)[0] - len(weight)
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def tensor_scale(weight: Tensor, largest: float) -> Tensor:
    """The float32 scale that brings the largest magnitude to `largest`; 1 for a weight of zeros."""
    low, high = weight.aminmax()  # without a copy of the weight
    scale = torch.maximum(high, -low).float() / largest
    return scale if scale else torch.ones_like(scale)


def to_e4m3(values: Tensor) -> Tensor:
    """Rounded to float8_e4m3fn, values beyond its range to its largest."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_mx(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn (N,K), exponents of the scales (N,K/32) uint8 with bias 127)."""
    blocks = rearrange(weight, "n (b k) -> n b k", k=MX_BLOCK)
    largest = blocks.abs().amax(dim=-1)
    exponent = torch.ceil(torch.log2((largest / E4M3_MAX).clamp(min=2**-127))).to(torch.int32) + E8M0_BIAS
    exponent = exponent.clamp_(0, 254).to(torch.uint8)
    values = to_e4m3(blocks / torch.where(largest == 0, 1.0, _power(exponent))[..., None])
    return rearrange(values, "n b k -> n (b k)"), torch.where(largest == 0, 0, exponent).to(torch.uint8)


def dequantize_mx(values: Tensor, exponents: Tensor) -> Tensor:
    """Inverse of quantize_mx, float32."""
    blocks = rearrange(values.float(), "n (b k) -> n b k", k=MX_BLOCK) * _power(exponents)[..., None]
    return rearrange(blocks, "n b k -> n (b k)")


def _power(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) by its bit pattern."""
    return (exponents.to(torch.int32) << 23).view(torch.float32)


def quantize_nv(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(two e2m1 codes per byte (N,K/2) uint8, the even input in the high bits; scales (N,K/16) float8_e4m3fn).

    scale: of the tensor, which multiplies those of the blocks.
    """
    blocks = rearrange(weight, "n (b k) -> n b k", k=NV_BLOCK)
    block_scale = (blocks.abs().amax(dim=-1) / E2M1_MAX / scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    total = (scale * block_scale.float())[..., None]
    values = torch.where(total == 0, 0.0, blocks / torch.where(total == 0, 1.0, total))
    codes = e2m1_codes(values).flatten(1)
    return codes[:, 0::2] << 4 | codes[:, 1::2], block_scale


def dequantize_nv(packed: Tensor, block_scale: Tensor, scale: Tensor) -> Tensor:
    """Inverse of quantize_nv, float32 (N,K)."""
    codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten(1).int()
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
    blocks = rearrange(table[codes], "n (b k) -> n b k", k=NV_BLOCK) * (scale * block_scale.float())[..., None]
    return rearrange(blocks, "n b k -> n (b k)")


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes (uint8) of the nearest e2m1 values: sign in bit 3, magnitude in bits 0 to 2; ties to the even code."""
    size = values.abs()
    codes = torch.signbit(values).to(torch.uint8) << 3
    for code, limit in enumerate(E2M1_LIMITS):
        codes += (size > limit) if code % 2 == 0 else (size >= limit)
    return codes


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of `tiled` scales."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def tiled(scales: Tensor) -> Tensor:
    """Scales (rows, columns) in the order that cuBLAS reads them: tiles of 128x4, each as 32 rows of 4x4.

    https://docs.nvidia.com/cuda/cublas/index.html#d-block-scaling-factors-layout
    """
    rows, columns = tiled_shape(*scales.shape)
    values = F.pad(scales.view(torch.uint8), (0, columns - scales.shape[1], 0, rows - scales.shape[0]))
    order = rearrange(values, "(R a r) (C c) -> (R C r a c)", a=4, r=32, c=4)
    return order.reshape(rows, columns).view(scales.dtype)


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of tiled."""
    high = scales.shape[0] // 128
    order = scales.view(torch.uint8).flatten()
    values = rearrange(order, "(R C r a c) -> (R a r) (C c)", R=high, a=4, r=32, c=4)
    return values[:rows, :columns].contiguous().view(scales.dtype)

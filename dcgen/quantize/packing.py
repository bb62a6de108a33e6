# N outputs, K inputs, R rank, T tiles of 128 outputs
"""The order of values in nunchaku's files: that in which a warp's 32 lanes read them (PTX mma.m16n8k64).

Each packing is a permutation with its inverse. The layouts are those of deepcompressor's writer
(https://github.com/mit-han-lab/deepcompressor, Apache-2.0), which nunchaku's kernels expect.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

TILE = 128  # outputs and inputs are padded to multiples of it
CODES = "(T p a l) (U c d r) -> T U p l d a c r"
CODES_SIZES = {"p": 8, "a": 2, "l": 8, "c": 2, "d": 4, "r": 8}
SCALES = "(T b c d e) G -> T G b d c e"
SCALES_SIZES = {"b": 8, "c": 2, "d": 4, "e": 2}
MICRO = "(T a b c) (G k) -> T G c b a k"
MICRO_SIZES = {"a": 4, "b": 4, "c": 8, "k": 4}
DOWN, UP = "(R a l) (C c d r) -> C R l d a c r", "(C a l) (R c d r) -> C R l d a c r"
RANK_SIZES = {"a": 2, "l": 8, "c": 2, "d": 4, "r": 2}


def up_to(size: int, multiple: int) -> int:
    """The size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def padded(tensor: Tensor, rows: int, columns: int, value: float = 0) -> Tensor:
    """The matrix with rows and columns of `value` up to multiples of `rows` and `columns`."""
    missing = up_to(tensor.shape[1], columns) - tensor.shape[1], up_to(len(tensor), rows) - len(tensor)
    return F.pad(tensor, (0, missing[0], 0, missing[1]), value=value)


def packed_codes(codes: Tensor) -> Tensor:
    """4-bit codes (N,K) uint8, multiples of 128 -> int8 (N,K/2)."""
    order = rearrange(codes & 0xF, CODES, **CODES_SIZES).reshape(len(codes), -1, 2)
    return (order[..., 0] | order[..., 1] << 4).view(torch.int8)


def unpacked_codes(packed: Tensor) -> Tensor:
    """Inverse of packed_codes."""
    values = packed.view(torch.uint8)
    order = torch.stack([values & 0xF, values >> 4], dim=-1)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    tiles = order.reshape(rows // 128, columns // 64, 8, 8, 4, 2, 2, 8)
    return rearrange(tiles, _inverse(CODES), **CODES_SIZES)


def packed_scales(scales: Tensor) -> Tensor:
    """Values per output (N,G), N a multiple of 128 -> (G,N)."""
    return rearrange(scales, SCALES, **SCALES_SIZES).reshape(scales.shape[1], len(scales))


def unpacked_scales(packed: Tensor) -> Tensor:
    """Inverse of packed_scales."""
    groups, rows = packed.shape
    tiles = packed.reshape(rows // 128, groups, 8, 4, 2, 2)
    return rearrange(tiles, _inverse(SCALES), **SCALES_SIZES)


def packed_vector(values: Tensor) -> Tensor:
    """One value per channel, a multiple of 128, in the order of packed_scales."""
    return packed_scales(values[:, None]).flatten()


def unpacked_vector(packed: Tensor) -> Tensor:
    """Inverse of packed_vector."""
    return unpacked_scales(packed[None]).flatten()


def packed_micro_scales(scales: Tensor) -> Tensor:
    """One-byte scales per 16 inputs (N,K/16), multiples of 128 and 4 -> (K/16,N)."""
    order = rearrange(scales.view(torch.uint8), MICRO, **MICRO_SIZES)
    return order.reshape(scales.shape[1], len(scales)).view(scales.dtype)


def unpacked_micro_scales(packed: Tensor) -> Tensor:
    """Inverse of packed_micro_scales."""
    groups, rows = packed.shape
    tiles = packed.view(torch.uint8).reshape(rows // 128, groups // 4, 8, 4, 4, 4)
    return rearrange(tiles, _inverse(MICRO), **MICRO_SIZES).contiguous().view(packed.dtype)


def packed_down(down: Tensor) -> Tensor:
    """(R,K), multiples of 16 -> (K,R)."""
    return rearrange(down, DOWN, **RANK_SIZES).reshape(down.shape[1], down.shape[0])


def unpacked_down(packed: Tensor) -> Tensor:
    """Inverse of packed_down."""
    K, R = packed.shape
    return rearrange(packed.reshape(K // 16, R // 16, 8, 4, 2, 2, 2), _inverse(DOWN), **RANK_SIZES)


def packed_up(up: Tensor) -> Tensor:
    """(N,R), multiples of 16 -> (N,R)."""
    return rearrange(up, UP, **RANK_SIZES).reshape(up.shape)


def unpacked_up(packed: Tensor) -> Tensor:
    """Inverse of packed_up."""
    N, R = packed.shape
    return rearrange(packed.reshape(N // 16, R // 16, 8, 4, 2, 2, 2), _inverse(UP), **RANK_SIZES)


def packed_modulation(codes: Tensor) -> Tensor:
    """4-bit codes (N,K) uint8 of a weight-only layer, multiples of 4 and 64 -> int32 (N/4,K/2).

    Of 32 inputs the bits of a 16-bit word hold every eighth; four outputs alternate by 64 inputs.
    """
    fours = rearrange(codes.to(torch.int32), "n (g f e) -> n g e f", f=4, e=8)
    words = fours[..., 0] | fours[..., 1] << 4 | fours[..., 2] << 8 | fours[..., 3] << 12
    order = rearrange(words, "(n four) (h two) e -> n h four (two e)", four=4, two=2)
    return order.reshape(len(codes) // 4, -1).to(torch.int16).view(torch.int32)


def unpacked_modulation(packed: Tensor) -> Tensor:
    """Inverse of packed_modulation."""
    words = packed.view(torch.int16).to(torch.int32) & 0xFFFF
    order = words.reshape(len(packed), -1, 4, 16)
    rows = rearrange(order, "n h four (two e) -> (n four) (h two) e", two=2)
    fours = torch.stack([rows >> shift & 0xF for shift in (0, 4, 8, 12)], dim=-1)
    return rearrange(fours, "n g e f -> n (g f e)").to(torch.uint8)


def _inverse(pattern: str) -> str:
    before, _, after = pattern.partition(" -> ")
    return f"{after} -> {before}"

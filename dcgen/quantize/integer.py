# N outputs, K inputs, g groups of 16 inputs
"""Integer formats: rotation of the inputs, 8 bits per row, and 4- or 6-bit codes in groups.

The rotation (ConvRot, arXiv:2512.03673) spreads the outliers of a few inputs over all inputs of a group. It is
orthogonal and symmetric, so applying it twice gives the weight back; the inputs are rotated likewise when the layer
runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

LARGEST_ROTATION = 256
GROUP = 16
INT8_MAX = 127.0
TINY = 1e-8  # smallest scale of a group or a row
REFINEMENTS = 2  # least-squares steps for the scales of groups
EVEN_LEVELS = torch.arange(-31, 32, dtype=torch.float32)  # of 6-bit codes
# Levels of 4-bit codes in units of the largest value of a group: least mean square error for a normal distribution, to
# which the rotation brings most weights. They are those that comfy-kitchen stores and its kernels know.
NORMAL_LEVELS = (
    *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
)
# Weights whose groups have a larger excess kurtosis than this get levels of their own.
KURTOSIS = -0.1
KURTOSIS_SAMPLES, LEVEL_SAMPLES, ROW_SAMPLES = 1 << 19, 300_000, 1 << 22
LEVEL_STEPS = 25


def rotation_size(inputs: int) -> int:
    """Largest power of 4 up to 256 that divides the number of inputs; ValueError when none does."""
    size = LARGEST_ROTATION
    while size > 1 and inputs % size:
        size //= 4
    if size == 1:
        raise ValueError(f"its {inputs} inputs are not a multiple of 4")
    return size


@lru_cache(maxsize=8)
def hadamard(size: int, device: torch.device) -> Tensor:
    """(size, size) symmetric orthogonal matrix of equal magnitudes: the Kronecker power of a regular 4x4 one."""
    four = torch.ones(4, 4, device=device) - 2 * torch.eye(4, device=device).flip(1)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    normalized: Tensor = matrix / size**0.5
    return normalized


def rotated(weight: Tensor) -> Tensor:
    """The weight (N,K) float32 for rotated inputs; its own inverse."""
    size = rotation_size(weight.shape[1])
    groups = rearrange(weight, "n (g k) -> n g k", k=size)
    return rearrange(groups @ hadamard(size, weight.device).T, "n g k -> n (g k)")


def quantize_rows(weight: Tensor) -> dict[str, Tensor]:
    """int8 (N,K) and the scale of each row (N,1)."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp(min=1e-30)
    return {"weight": (weight / scale).round_().clamp_(-128, INT8_MAX).to(torch.int8), "weight_scale": scale}


def quantize_groups(weight: Tensor, table: Tensor) -> dict[str, Tensor]:
    """Codes of a rotated weight (N,K): packed int8 (N,K*bits/8), and the scales of groups (N,g) and rows (N,).

    table: the levels, sorted. A stored value is row scale * round(level * group scale), an 8-bit integer in between.
    """
    grouped = rearrange(weight, "n (g k) -> n g k", k=GROUP)
    even = len(table) > 16
    scale = grouped.abs().amax(dim=-1, keepdim=True)
    scale = (scale / table[-1] if even else scale).clamp(min=TINY)
    codes = _nearest(grouped / scale, table)
    for _ in range(REFINEMENTS):
        levels = table[codes]
        scale = (grouped * levels).sum(-1, keepdim=True) / (levels * levels).sum(-1, keepdim=True).clamp(min=TINY)
        scale = scale.clamp(min=TINY)
        codes = _nearest(grouped / scale, table)
    row_scale = ((table[codes] * scale).abs().amax(dim=(1, 2)) / INT8_MAX).clamp(min=TINY)
    group_scale = (scale.squeeze(-1) / row_scale[:, None]).to(torch.float8_e4m3fn)
    target = grouped / row_scale[:, None, None]
    if even:
        group_scale, codes = _best_scale(target, group_scale, table)
        codes = codes + 1  # 1..63, so that 32 is zero
    else:
        codes = _nearest_integer(target, group_scale, table)[0]
    packed = packed_codes(rearrange(codes, "n g k -> n (g k)"), 6 if even else 4)
    return {"weight": packed, "weight_s_rel": group_scale, "weight_s_channel": row_scale}


def dequantize_groups(parts: Mapping[str, Tensor], inputs: int) -> Tensor:
    """The rotated weight (N,K) float32 of quantize_groups."""
    codes = unpacked_codes(parts["weight"], inputs)
    table = parts.get("weight_codebook")
    levels = codes.float() - 32 if table is None else table[codes.long()]
    grouped = rearrange(levels, "n (g k) -> n g k", k=GROUP) * parts["weight_s_rel"].float()[..., None]
    integers = grouped.round_().clamp_(-INT8_MAX, INT8_MAX)
    return rearrange(integers * parts["weight_s_channel"][:, None, None], "n g k -> n (g k)")


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest level, the lower one of two that are as near."""
    if len(table) > 16:  # evenly spaced
        return (values.round().clamp_(table[0], table[-1]) - table[0]).long()
    above = torch.searchsorted(table, values.contiguous())
    low, high = (above - 1).clamp_(min=0), above.clamp_(max=len(table) - 1)
    return torch.where((values - table[high]).abs() < (values - table[low]).abs(), high, low)


def _nearest_integer(target: Tensor, scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, squared error of each group) when each level is rounded to an 8-bit integer, as kernels do."""
    levels = (table * scale.float()[..., None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    above = torch.searchsorted(levels, target.contiguous())
    low, high = (above - 1).clamp_(min=0), above.clamp_(max=len(table) - 1)
    below_error = (target - levels.gather(2, low)).abs_()
    codes = torch.where((target - levels.gather(2, high)).abs_() < below_error, high, low)
    return codes, (levels.gather(2, codes) - target).square_().sum(-1)


def _best_scale(target: Tensor, scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, codes) of least error for each group, among its scale and the two float8 values next to it."""
    pattern = scale.view(torch.uint8)
    best, least, codes = scale, *_nearest_integer(target, scale, table)[::-1]
    for other in ((pattern - 1).clamp_(min=1), (pattern + 1).clamp_(max=0x7E)):  # 0x7F is NaN
        candidate = other.view(torch.float8_e4m3fn)
        found, error = _nearest_integer(target, candidate, table)
        better = error < least
        best = torch.where(better, other, best.view(torch.uint8)).view(torch.float8_e4m3fn)
        least, codes = torch.where(better, error, least), torch.where(better[..., None], found, codes)
    return best, codes


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (N,K) as int8 (N,K*bits/8): the low 4 bits of two codes per byte, even inputs first; then, of 6-bit codes,
    the high 2 bits of four codes per byte.
    """
    codes = codes.to(torch.uint8)
    low = codes & 0xF
    packed = low[:, 0::2] | low[:, 1::2] << 4
    if bits == 6:
        high = codes >> 4
        fours = high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
        packed = torch.cat([packed, fours], dim=1)
    return packed.view(torch.int8)


def unpacked_codes(packed: Tensor, inputs: int) -> Tensor:
    """Inverse of packed_codes: uint8 (N,K)."""
    values = packed.view(torch.uint8)
    pairs, fours = values[:, : inputs // 2], values[:, inputs // 2 :]
    codes = torch.stack([pairs & 0xF, pairs >> 4], dim=-1).flatten(1)
    if fours.shape[1]:
        codes |= (torch.stack([fours >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1) << 4).flatten(1)
    return codes


def codebook(weight: Tensor) -> Tensor:
    """(16,) levels of the 4-bit codes of a weight (N,K): NORMAL_LEVELS, or fitted ones for a heavy-tailed weight."""
    rows = max(1, ROW_SAMPLES // weight.shape[1])
    if len(weight) > rows:
        weight = weight[torch.linspace(0, len(weight) - 1, rows, device=weight.device).long()]
    grouped = rearrange(rotated(weight.float()), "n (g k) -> n g k", k=GROUP)
    values = (grouped / grouped.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)).flatten()
    sample = _sampled(values, KURTOSIS_SAMPLES)
    kurtosis = ((sample - sample.mean()) / (sample.std() + 1e-9)).pow(4).mean() - 3
    if float(kurtosis) <= KURTOSIS:
        return torch.tensor(NORMAL_LEVELS, device=weight.device)
    return _fitted_levels(_sampled(values, LEVEL_SAMPLES))


def _sampled(values: Tensor, most: int) -> Tensor:
    if values.numel() <= most:
        return values
    generator = torch.Generator(device=values.device).manual_seed(0)
    return values[torch.randint(0, values.numel(), (most,), device=values.device, generator=generator)]


def _fitted_levels(sample: Tensor) -> Tensor:
    """16 levels of least mean square error for the sample, by Lloyd's algorithm from its quantiles."""
    levels = torch.quantile(sample, torch.linspace(0, 1, 16, device=sample.device))
    for _ in range(LEVEL_STEPS):
        nearest = (sample[:, None] - levels).abs().argmin(-1)
        chosen = [sample[nearest == i] for i in range(16)]
        levels = torch.stack([part.mean() if len(part) else level for part, level in zip(chosen, levels, strict=True)])
    return levels

# B batch, H W image rows and columns
"""How far a reconstruction is from the original."""

from __future__ import annotations

import math

from torch import Tensor

from ..precision import with_float64


def psnr(first: Tensor, second: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of one shape with values in 0..peak; inf when they are equal."""
    error = (with_float64(first).double() - with_float64(second).double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def common_part(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IMAGEs (B,H,W,3) cut around the middle to their common size (an autoencoder crops to multiples of f)."""
    height = min(first.shape[1], second.shape[1])
    width = min(first.shape[2], second.shape[2])
    return _middle(first, height, width), _middle(second, height, width)


def _middle(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width, :3]

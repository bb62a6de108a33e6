"""Euler sampling along a network's velocity: one pass per step, guidance through the embedding or true CFG."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dcgen import guidance
from train.conditioning import Cond, under_empty
from train.objective import Velocity


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal from one CPU generator per seed: the same on every device and batch size."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


@torch.no_grad()
def euler(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    cond: Cond,
    *,
    scale: float | None = None,
    empty: Cond | None = None,
    w: float = 0.0,
) -> Tensor:
    """Model-space latents (B,C,h,w) from noise at sigmas[0] = 1 down to 0.

    `scale`: guidance embedding g = 1 + w, None for models without. `empty` with `w` > 0: true classifier-free
    guidance of arXiv:2509.25180 Eq. 4, two passes a step.
    """
    latents = noise
    rows = torch.arange(len(noise), device=noise.device)
    for sigma, following in pairwise(sigmas):
        now = sigma.to(latents).expand(len(latents))
        g = None if scale is None else torch.full_like(now, scale)
        v = velocity(latents, now, cond, g)
        if empty is not None and w > 0:
            v = guidance.cfg_velocity(v, velocity(latents, now, under_empty(cond, empty, rows), g), w)
        latents = latents + (following - sigma).to(latents) * v
    return latents


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """(B,3,H,W) in -1..1 -> one image (3,H',W') in 0..1, white between."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image.float().cpu() / 2 + 0.5
    return sheet.clamp(0, 1)

# B batch, C latent channels, h w latent rows and columns, f spatial factor
"""Preview factors of a latent space: the linear map from a latent pixel to the mean colour of its f x f pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .latent import LatentSpace

Encode = Callable[[Tensor], Tensor]
# Relative to the mean power of a channel: avoids extreme factors for channels that hardly vary on these images.
RIDGE = 1e-3


def fit_preview(
    encode: Encode, space: LatentSpace, images: Iterable[Tensor] | None = None
) -> tuple[LatentSpace, float]:
    """(the space with rgb_factors and rgb_bias, share of the colours' variance that they explain).

    encode: image (B,3,H,W) in -1..1 -> raw latent (B,C,H/f,W/f); images: batches of images, by default those of
    sample_images(). ValueError when there are fewer latents than unknowns.
    """
    unknowns = space.channels + 1
    xx, xy = torch.zeros(unknowns, unknowns, dtype=torch.float64), torch.zeros(unknowns, 3, dtype=torch.float64)
    yy, y, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for batch in images if images is not None else sample_images(space):
        latent = space.normalize(encode(batch)).detach().cpu().double()
        colour = F.avg_pool2d(batch.cpu().double(), space.spatial_factor).movedim(1, -1).reshape(-1, 3)
        feature = latent.movedim(1, -1).reshape(-1, space.channels)
        feature = torch.cat((feature, feature.new_ones(len(feature), 1)), dim=1)
        xx, xy = xx + feature.T @ feature, xy + feature.T @ colour
        yy, y, count = yy + colour.square().sum(0), y + colour.sum(0), count + len(colour)
    if count < unknowns:
        raise ValueError(f"{count} latents cannot determine {unknowns} preview factors: give more or larger images")
    ridge = torch.cat((torch.full((space.channels,), RIDGE * float(xx.diagonal()[:-1].mean())), torch.zeros(1)))
    theta = torch.linalg.solve(xx + torch.diag(ridge.double()), xy)
    residual = yy - 2 * (theta * xy).sum(0) + (theta * (xx @ theta)).sum(0)
    explained = 1 - float(residual.sum() / (yy - y.square() / count).sum())
    rows = [(round(red, 6), round(green, 6), round(blue, 6)) for red, green, blue in theta.tolist()]
    return replace(space, rgb_factors=tuple(rows[:-1]), rgb_bias=rows[-1]), explained


def sample_images(space: LatentSpace, seed: int = 0) -> Iterator[Tensor]:
    """Synthetic images (4,3,H,W) in -1..1, enough for the space's channels: colour fields of all scales, and edges."""
    generator = torch.Generator().manual_seed(seed)
    side = 8
    pixels = side * space.spatial_factor
    batches = max(4, -(-8 * (space.channels + 1) // (4 * side * side)))
    for _ in range(batches):
        images = torch.zeros(4, 3, pixels, pixels)
        for cells in (2, 4, 8, 16):
            field = torch.randn(4, 3, cells, cells, generator=generator)
            mode = "bilinear" if cells < 16 else "nearest"
            images += F.interpolate(field, size=(pixels, pixels), mode=mode) / cells**0.5
        images += torch.randn(4, 3, 1, 1, generator=generator) * 0.7
        yield images.tanh()

# B batch, H W image rows and columns, f spatial factor, C latent channels, h w latent rows and columns
"""Fitting image sides to the autoencoder's spatial factor, and latent compositing with positions in pixels."""

from __future__ import annotations

import logging
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...dcgen.latent import LatentSpace
from .latent_format import LATENT_TAG

FITS = ("crop", "pad", "resize")
SIZE = "dcgen_size"  # in a LATENT: (height, width) of the image before it was padded


def fitted(image: Tensor, f: int, fit: str) -> Tensor:
    """IMAGE (B,H,W,C) with sides that are multiples of f: center-cropped, padded at the right and bottom by repeating
    the border, or resized to the nearest multiples. ValueError for an unknown `fit`.
    """
    if fit not in FITS:
        raise ValueError(f"`fit` is {fit!r}; choose one of {', '.join(FITS)}")
    height, width = image.shape[1:3]
    if not (height % f or width % f):
        return image
    if fit == "resize":
        sides = [max(f, round(side / f) * f) for side in (width, height)]
        return (
            comfy.utils.common_upscale(image.movedim(-1, 1), *sides, "bicubic", "disabled").clamp(0, 1).movedim(1, -1)
        )
    if fit == "pad":
        padding = (0, -width % f, 0, -height % f)
        return F.pad(image.movedim(-1, 1), padding, mode="replicate").movedim(1, -1)
    logging.info("DC-AE Encode: %dx%d is cropped to %dx%d", width, height, width // f * f, height // f * f)
    return image  # the VAE crops


def with_size(latent: dict[str, Any], image: Tensor) -> dict[str, Any]:
    """The LATENT of a padded image, with the size of the image (B,H,W,C) before padding."""
    return {**latent, SIZE: tuple(image.shape[1:3])}


def original_size(latent: dict[str, Any], image: Tensor, f: int) -> Tensor:
    """The decoded image (B,H,W,3) without the padding that `with_size` recorded, unless its size has changed since."""
    height, width = latent.get(SIZE, image.shape[1:3])
    padded = (-(-height // f) * f, -(-width // f) * f)
    return image[:, :height, :width] if tuple(image.shape[1:3]) == padded else image


def composite(
    destination: dict[str, Any], source: dict[str, Any], x: int, y: int, mask: Tensor | None = None
) -> dict[str, Any]:
    """LATENT: `source` pasted into `destination` with its upper left corner at pixel (x, y), cropped to fit.

    mask: (B,H,W), scaled to the source, 1 where it is pasted. ValueError when the destination has no latent tag, the
    latents are from different autoencoders, or x and y are not multiples of the spatial factor.
    """
    space = destination.get(LATENT_TAG)
    if not isinstance(space, LatentSpace):
        raise ValueError(
            "the destination does not say which autoencoder it is from. Make it with DC-AE Encode, Empty Latent "
            "(DC-Gen) or Sampler 4K; for f8 latents use LatentCompositeMasked."
        )
    other = source.get(LATENT_TAG)
    if isinstance(other, LatentSpace) and (differences := space.differences(other)):
        raise ValueError(f"the two latents are from different autoencoders: {'; '.join(differences)}")
    f = space.spatial_factor
    if x % f or y % f:
        nearest = [round(side / f) * f for side in (x, y)]
        raise ValueError(
            f"({x}, {y}) is not a multiple of {f} pixels, one latent pixel. Nearest: ({nearest[0]}, {nearest[1]})."
        )
    target = destination["samples"].clone()
    pasted = comfy.utils.repeat_to_batch_size(source["samples"].to(target), target.shape[0])
    top, left = y // f, x // f
    rows, columns = min(pasted.shape[2], target.shape[2] - top), min(pasted.shape[3], target.shape[3] - left)
    if rows <= 0 or columns <= 0:
        raise ValueError(
            f"({x}, {y}) lies outside the destination of {target.shape[3] * f}x{target.shape[2] * f} pixels"
        )
    opacity = _opacity(mask, pasted)[:, :, :rows, :columns]
    part = target[:, :, top : top + rows, left : left + columns]
    part.copy_(torch.lerp(part, pasted[:, :, :rows, :columns], opacity))
    return {**destination, "samples": target}


def _opacity(mask: Tensor | None, pasted: Tensor) -> Tensor:
    """(B,1,h,w) in 0..1: the mask in latent pixels."""
    if mask is None:
        return pasted.new_ones((pasted.shape[0], 1, *pasted.shape[2:]))
    full = mask.reshape(-1, 1, *mask.shape[-2:]).to(pasted)
    scaled = F.interpolate(full, size=pasted.shape[2:], mode="area")
    return comfy.utils.repeat_to_batch_size(scaled, pasted.shape[0])

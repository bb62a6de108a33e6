# B batch, C latent channels, h w latent rows and columns, f spatial factor, p patch size
"""A dcgen latent space as ComfyUI's LatentFormat, the latent tag of a LATENT, and the information kept on a MODEL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import torch
from torch import Tensor

from ...dcgen.backbones import Config
from ...dcgen.latent import LatentSpace
from ...dcgen.schedule import Schedule
from ...dcgen.spaces import SPACES

# A preview has one pixel per latent pixel, which is too small from f32 on; it is enlarged to one per 8 image pixels.
PREVIEW_DOT = 8
LATENT_TAG = "dcgen_space"  # key in a LATENT: the LatentSpace of the autoencoder it is from
TEXT_KEY = "dcgen_text"  # key in a CONDITIONING of our nodes: the family that it was encoded for


class DCGenLatentFormat(comfy.latent_formats.LatentFormat):
    """A LatentSpace for ComfyUI. LATENTs (B,C,h,w) in the graph are raw, as the autoencoder made them."""

    def __init__(self, space: LatentSpace):
        self.space = space
        self.latent_channels = space.channels
        self.latent_dimensions = 2
        self.scale_factor = space.scaling_factor
        self.shift_factor = space.shift_factor
        # ComfyUI 0.11 and later resize an empty latent made for another factor by this; earlier versions ignore it.
        self.spacial_downscale_ratio = space.spatial_factor
        self.latent_rgb_factors = [list(row) for row in space.rgb_factors] if space.rgb_factors else None
        self.latent_rgb_factors_bias = list(space.rgb_bias) if space.rgb_bias else None
        self.latent_rgb_factors_reshape = self._spread if space.spatial_factor > PREVIEW_DOT else None

    def process_in(self, latent: Tensor) -> Tensor:
        return self.space.normalize(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        return self.space.denormalize(latent)

    def _spread(self, x0: Tensor) -> Tensor:
        scale = self.space.spatial_factor // PREVIEW_DOT
        return torch.nn.functional.interpolate(x0[:1], scale_factor=scale, mode="bilinear")


class PackedFormat(DCGenLatentFormat):
    """A packed LatentSpace. LATENTs are in model space: core's VAE normalises them."""

    def process_in(self, latent: Tensor) -> Tensor:
        return latent

    def process_out(self, latent: Tensor) -> Tensor:
        return latent


# Spaces for which core has a class, with preview factors and a TAESD.
CORE_FORMATS = {"flux-f8c16": comfy.latent_formats.Flux, "flux2-f16c128": comfy.latent_formats.Flux2}


def latent_format(space: LatentSpace) -> comfy.latent_formats.LatentFormat:
    """LatentFormat of a space: core's class for those in CORE_FORMATS."""
    for name, kind in CORE_FORMATS.items() if space.rgb_factors is None else ():
        if not SPACES[name].differences(space):
            known = kind()
            known.spacial_downscale_ratio = space.spatial_factor  # versions before 0.11 lack it
            return known
    return DCGenLatentFormat(space) if space.packing == 1 else PackedFormat(space)


@dataclass(frozen=True)
class ModelInfo:
    """What sampling needs to know about a MODEL: latent space, patch size, schedule (None for other loaders' MODELs
    that are not flow models), and the image side in pixels that it was trained for, if known.
    """

    space: LatentSpace
    patch_size: int
    schedule: Schedule | None
    pixels: int | None = None

    @property
    def token_channels(self) -> int:
        """Values per token: C * p * p."""
        return self.space.channels * self.patch_size**2

    @property
    def native_tokens(self) -> int:
        """Tokens at the native resolution; 32x32 for the published models at 32 pixels per token, 64x64 for others."""
        side = self.space.spatial_factor * self.patch_size
        return (self.pixels // side if self.pixels else 32 if side == 32 else 64) ** 2


@dataclass(frozen=True, kw_only=True)
class FamilyInfo(ModelInfo):
    """ModelInfo of a MODEL made by this pack: also its family and config, and the layers of its network that depend on
    the latent -> their names in LoRA files.
    """

    schedule: Schedule
    family: str
    config: Config
    latent_layers: dict[str, str]


def space_of_vae(vae: Any) -> LatentSpace:
    """Latent space of a VAE; of other VAEs than a DC-AE only channels and spatial factor are known."""
    space = getattr(vae, "space", None)
    if isinstance(space, LatentSpace):
        return space
    return LatentSpace("", vae.latent_channels, int(vae.spacial_compression_decode()), 1.0)


def tagged(latent: dict[str, Any], space: LatentSpace) -> dict[str, Any]:
    """The LATENT with its latent tag. Core nodes pass the tag on; `check_tag` reads it."""
    return {**latent, LATENT_TAG: space}


def check_tag(latent: dict[str, Any], space: LatentSpace, reader: str) -> None:
    """ValueError when a latent is tagged with another space than `space`; one without a tag passes."""
    tag = latent.get(LATENT_TAG)
    if isinstance(tag, LatentSpace) and (differences := tag.differences(space)):
        raise ValueError(
            f"the latent was made by {tag.name or 'another autoencoder'} and {reader} takes those of "
            f"{space.name or 'its own'}. Different: {'; '.join(differences)}. Encode with the autoencoder of the model."
        )

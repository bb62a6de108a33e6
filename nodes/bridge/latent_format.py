# B batch, C latent channels, h w latent rows and columns, f spatial factor, p patch size
"""A dcgen latent space as ComfyUI's LatentFormat, the latent tag of a LATENT, and the information kept on a MODEL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_sampling
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


def latent_format(space: LatentSpace) -> comfy.latent_formats.LatentFormat:
    """LatentFormat of a space; for FLUX's own space core's class, which has preview factors and TAEF1."""
    flux = SPACES["flux-f8c16"]
    if space.rgb_factors is None and not flux.differences(space):
        return comfy.latent_formats.Flux()
    return DCGenLatentFormat(space)


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


def info_of(model: Any) -> ModelInfo:
    """The ModelInfo of a MODEL: stored on ours, for other loaders read from the latent format and patch size."""
    base = model.model
    info = getattr(base, "dcgen", None)
    if isinstance(info, ModelInfo):
        return info
    core_format = model.get_model_object("latent_format")
    factor = int(getattr(core_format, "spacial_downscale_ratio", 8))
    scaling, shift = float(core_format.scale_factor), float(getattr(core_format, "shift_factor", 0.0))
    space = LatentSpace("", core_format.latent_channels, factor, scaling, shift)
    return ModelInfo(space, int(getattr(base.diffusion_model, "patch_size", 1) or 1), foreign_schedule(model))


def foreign_schedule(model: Any) -> Schedule | None:
    """The schedule of a MODEL from another loader, by its sampling object; None when it is not a flow model.

    Core stores FLUX's shift for one image size there; we use FLUX's rule at the size of the latent.
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        return Schedule("flux")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        return Schedule("static", shift=float(sampling.shift), sigma_max=1.0)
    return None


def empty_latent(model: Any, width: int, height: int, batch_size: int) -> dict[str, Any]:
    """A LATENT of zeros for `model`: samples (B,C,height/f,width/f). ValueError names the nearest valid size."""
    info = info_of(model)
    side = info.space.spatial_factor * info.patch_size
    if width % side or height % side:
        nearest = [max(side, round(pixels / side) * side) for pixels in (width, height)]
        raise ValueError(
            f"{width}x{height} pixels do not fit this model: {info.space.name or 'its latent'} at "
            f"f{info.space.spatial_factor}, patch {info.patch_size}, needs multiples of {side}. "
            f"Nearest: {nearest[0]}x{nearest[1]}."
        )
    rows, columns = height // info.space.spatial_factor, width // info.space.spatial_factor
    device = comfy.model_management.intermediate_device()
    samples = torch.zeros((batch_size, info.space.channels, rows, columns), device=device)
    return tagged({"samples": samples, "downscale_ratio_spacial": info.space.spatial_factor}, info.space)

# B batch, C latent channels, h w latent rows and columns, f spatial factor, p patch size
"""A dcgen latent space as ComfyUI's LatentFormat, and what our models tell about themselves."""

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

# Each latent is one dot of the preview; from f32 on that is too small to see, so the dots are drawn this far apart.
PREVIEW_DOT = 8
STAMP = "dcgen_space"
TEXT_KEY = "dcgen_text"  # in a CONDITIONING's dict: the family whose text encoding it is, where a node of ours made it


class DCGenLatentFormat(comfy.latent_formats.LatentFormat):
    """LatentSpace in ComfyUI's terms. Latents (B,C,h,w) travel through the graph raw, as the autoencoder made them."""

    def __init__(self, space: LatentSpace):
        self.space = space
        self.latent_channels = space.channels
        self.latent_dimensions = 2
        self.scale_factor = space.scaling_factor
        self.shift_factor = space.shift_factor
        # ComfyUI 0.11 and later resize an empty latent that was made for another factor; earlier ones do not read it.
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
    """LatentFormat of a space; FLUX's own is core's, which has preview factors and a tiny decoder by name."""
    flux = SPACES["flux-f8c16"]
    if space.rgb_factors is None and not flux.differences(space):
        return comfy.latent_formats.Flux()
    return DCGenLatentFormat(space)


@dataclass(frozen=True)
class ModelInfo:
    """What a MODEL is sampled in: its latent space, patch size, the schedule its checkpoint wants (None for a foreign
    MODEL that is no flow model), and the image side in pixels it was made for, if known.
    """

    space: LatentSpace
    patch_size: int
    schedule: Schedule | None
    pixels: int | None = None

    @property
    def token_channels(self) -> int:
        """Numbers a token carries: C * p * p."""
        return self.space.channels * self.patch_size**2

    @property
    def native_tokens(self) -> int:
        """Tokens of the image it was made for; the published f32 models are made for 32x32 tokens, others for 64x64."""
        side = self.space.spatial_factor * self.patch_size
        return (self.pixels // side if self.pixels else 32 if side == 32 else 64) ** 2


@dataclass(frozen=True, kw_only=True)
class FamilyInfo(ModelInfo):
    """What a MODEL that this pack made tells on top: the name of its family and its config, and which layers of its
    network depend on the latent, with their names in LoRA files.
    """

    schedule: Schedule
    family: str
    config: Config
    latent_layers: dict[str, str]


def space_of_vae(vae: Any) -> LatentSpace:
    """Latent space of a VAE: a DC-AE says all of it; of any other only channels and factor are known."""
    space = getattr(vae, "space", None)
    if isinstance(space, LatentSpace):
        return space
    return LatentSpace("", vae.latent_channels, int(vae.spacial_compression_decode()), 1.0)


def stamped(latent: dict[str, Any], space: LatentSpace) -> dict[str, Any]:
    """The LATENT with a note of the space it is in. Core nodes carry the note along; `check_stamp` reads it."""
    return {**latent, STAMP: space}


def check_stamp(latent: dict[str, Any], space: LatentSpace, reader: str) -> None:
    """ValueError when a latent says it is from another autoencoder than `space`; one that says nothing passes."""
    known = latent.get(STAMP)
    if isinstance(known, LatentSpace) and (wrong := known.differences(space)):
        raise ValueError(
            f"the latent was made by {known.name or 'another autoencoder'} and {reader} takes those of "
            f"{space.name or 'its own'}. Different: {'; '.join(wrong)}. Encode with the autoencoder of the model."
        )


def info_of(model: Any) -> ModelInfo:
    """The ModelInfo of a MODEL: ours says it itself, any other is read off its latent format and patch size."""
    base = model.model
    known = getattr(base, "dcgen", None)
    if isinstance(known, ModelInfo):
        return known
    shape = model.get_model_object("latent_format")
    factor = int(getattr(shape, "spacial_downscale_ratio", 8))
    space = LatentSpace(
        "", shape.latent_channels, factor, float(shape.scale_factor), float(getattr(shape, "shift_factor", 0.0))
    )
    return ModelInfo(space, int(getattr(base.diffusion_model, "patch_size", 1) or 1), foreign_schedule(model))


def foreign_schedule(model: Any) -> Schedule | None:
    """The schedule of a MODEL that another loader made, by its sampling object; None when that is no flow's.

    The core keeps FLUX's shift at one size there; its rule, at the size of the latent, is meant.
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        return Schedule("flux")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        return Schedule("static", shift=float(sampling.shift), sigma_max=1.0)
    return None


def empty_latent(model: Any, width: int, height: int, batch_size: int) -> dict[str, Any]:
    """A LATENT of zeros for `model`: samples (B,C,height/f,width/f). ValueError names the nearest size that fits."""
    info = info_of(model)
    side = info.space.spatial_factor * info.patch_size
    if width % side or height % side:
        near = [max(side, round(pixels / side) * side) for pixels in (width, height)]
        raise ValueError(
            f"{width}x{height} pixels do not fit this model: {info.space.name or 'its latent'} at "
            f"f{info.space.spatial_factor}, patch {info.patch_size}, needs multiples of {side}. "
            f"Nearest: {near[0]}x{near[1]}."
        )
    rows, columns = height // info.space.spatial_factor, width // info.space.spatial_factor
    device = comfy.model_management.intermediate_device()
    samples = torch.zeros((batch_size, info.space.channels, rows, columns), device=device)
    return stamped({"samples": samples, "downscale_ratio_spacial": info.space.spatial_factor}, info.space)

# B batch, C latent channels, h w latent rows and columns, f spatial factor, p patch size
"""What is known of a MODEL, whichever loader made it, and an empty latent in its format."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch

from ...dcgen.latent import LatentSpace
from ...dcgen.schedule import LINEAR, Schedule
from .families import FAMILIES
from .family import Family
from .latent_format import ModelInfo, tagged


def info_of(model: Any) -> ModelInfo:
    """The ModelInfo of a MODEL: stored on ours, for other loaders read from the latent format and patch size."""
    base = model.model
    info = getattr(base, "dcgen", None)
    if isinstance(info, ModelInfo):
        return info
    core_format, family = model.get_model_object("latent_format"), _family_of(base)
    factor = int(getattr(core_format, "spacial_downscale_ratio", 8))  # versions before 0.11 lack it
    if family is not None and family.backbone.base_spatial_factor is not None:
        factor = family.backbone.base_spatial_factor
    scaling, shift = float(core_format.scale_factor), float(getattr(core_format, "shift_factor", 0.0))
    space = LatentSpace("", core_format.latent_channels, factor, scaling, shift)
    schedule = family and family.foreign_schedule(space)
    return ModelInfo(
        space, int(getattr(base.diffusion_model, "patch_size", 1) or 1), schedule or foreign_schedule(model)
    )


def _family_of(base: Any) -> Family | None:
    """The family of a BaseModel that has one."""
    return next((family for family in FAMILIES.values() if family.recognises(base)), None)


def foreign_schedule(model: Any) -> Schedule | None:
    """The schedule of a MODEL from another loader, by its sampling object; None when it is not a flow model.

    Core stores FLUX's shift for one image size there; we use FLUX's rule at the size of the latent.
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        return Schedule(LINEAR)
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

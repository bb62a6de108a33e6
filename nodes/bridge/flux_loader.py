# C latent channels, p patch size
"""FLUX weights on disk as a MODEL: diffusers or original names, any latent, core's quantized layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ...dcgen.backbones.base import patch_size
from ...dcgen.files import meta_tensors
from ...dcgen.release import Model
from . import lora
from .flux import FLUX, LATENT_LAYERS, finish
from .guard import guarded
from .latent_format import ModelInfo, latent_format
from .loading import Parts, by_layer, fill, is_dynamic, new_patcher, renamed, set_dtype


@torch.inference_mode(False)  # inference tensors could not be trained through (TrainLoraNode)
def load_flux(
    source: Model,
    pixels: int | None = None,
    options: Mapping[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from FLUX weights in either naming, read a layer at a time: nothing is held twice.

    source: its latent must be known; pixels: the image side it was made for, if known; options: dtype,
    fp8_optimizations, custom_operations as in comfy.sd.load_diffusion_model.
    """
    size = patch_size(FLUX.packed_channels(source.config), source.latent.channels, str(source.tensors.path))
    info = ModelInfo(source.latent, size, dict(source.schedule), pixels, LATENT_LAYERS)
    plan = {rule.original: (rule, entry) for rule, entry in source.original_entries(source.entries)}
    shapes = meta_tensors(entry for _, entry in plan.values())
    parts = ({name: plan[name][0].join(source.get) for name in names} for names in by_layer(plan))
    return build(shapes, parts, source.config, info, source.tensors.path, options or {}, disable_dynamic)


def build(
    shapes: Mapping[str, Tensor],
    parts: Parts,
    config: Mapping[str, Any],
    info: ModelInfo,
    path: Any,
    options: Mapping[str, Any],
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The BaseModel and its patcher. shapes: every original key (meta tensors do); parts: the weights by layer."""
    model_config = comfy.model_detection.model_config_from_unet(dict(shapes), "")
    if model_config is None:
        raise ValueError(f"{path}: ComfyUI does not take these weights for a FLUX model.")
    heads = config["num_attention_heads"]
    model_config.unet_config.update(
        num_heads=heads,
        hidden_size=heads * config["attention_head_dim"],
        axes_dim=list(config["axes_dims_rope"]),
        context_in_dim=config["joint_attention_dim"],
        vec_in_dim=config["pooled_projection_dim"],
        in_channels=info.space.channels,
        out_channels=info.space.channels,
        patch_size=info.patch_size,
    )
    model_config.latent_format = latent_format(info.space)
    set_dtype(model_config, shapes, options)
    model = model_config.get_model(dict(shapes), "").to(comfy.model_management.unet_offload_device())
    patcher = new_patcher(model, disable_dynamic)
    named = renamed(parts, model_config.process_unet_state_dict)
    fill(model.diffusion_model, named, path, assign=is_dynamic(patcher))
    finish(model, info)
    return guarded(lora.reported(patcher) if info.patch_size == 1 else patcher)

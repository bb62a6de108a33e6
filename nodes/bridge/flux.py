# C latent channels, D width, p patch size
"""What is FLUX's own about a DC-Gen MODEL: its ends, its config, its shift."""

from __future__ import annotations

import math
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
from torch import Tensor

from ...dcgen.adapter import Adapter
from ...dcgen.backbones import BACKBONES
from ...dcgen.schedule import shift_ratio
from .latent_format import ModelInfo, latent_format
from .overlay import Ends, copied_config, linear

FLUX = BACKBONE = BACKBONES["flux"]
LATENT_LAYERS = ("img_in", "final_layer.linear", "final_layer.adaLN_modulation.1")
# The core's memory estimate counts latent pixels and was tuned on FLUX's 2x2 patches.
PATCH_OF_ESTIMATE = 2


def base_config(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """The diffusers config of a MODEL's FLUX network, as far as the latent does not matter."""
    network = model.model.diffusion_model
    params = getattr(network, "params", None)
    if not isinstance(network, comfy.ldm.flux.model.Flux) or params.global_modulation:
        raise ValueError(
            f"DCGenApply needs a FLUX.1 model; this MODEL is a {type(model.model).__name__} "
            f"({type(network).__name__}). Load FLUX.1 (dev, Krea, ...) and connect that."
        )
    return {
        "num_attention_heads": params.num_heads,
        "attention_head_dim": params.hidden_size // params.num_heads,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "joint_attention_dim": params.context_in_dim,
        "pooled_projection_dim": params.vec_in_dim,
        "guidance_embeds": params.guidance_embed,
        "axes_dims_rope": list(params.axes_dim),
    }


def check_base(model: comfy.model_patcher.ModelPatcher, _adapter: Adapter, name: str) -> None:
    """ValueError when this MODEL is not a base: it already runs on a deep latent. name: of the adapter."""
    known = getattr(model.model, "dcgen", None)
    if isinstance(known, ModelInfo) and known.patch_size == 1:
        raise ValueError(
            f"this MODEL already runs on {known.space.name or 'a deep latent'}; {name} belongs on the base model. "
            f"Connect the base's loader to DCGenApply."
        )


def ends(model: comfy.model_patcher.ModelPatcher, adapter: Adapter, info: ModelInfo) -> Ends:
    """What the DC-Gen network has in place of the base's, by path: the adapter's layers, and sizes."""
    native = FLUX.to_original(adapter.tensors, base_config(model), partial=True)
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in native.items():
        module, _, suffix = key.rpartition(".")
        layers.setdefault(module, {})[suffix] = tensor
    made = {module: linear(weights, dtype, model.offload_device) for module, weights in layers.items()}
    packed = info.space.channels * info.patch_size**2
    return {**made, "patch_size": info.patch_size, "in_channels": packed, "out_channels": packed}


def deep_config(model: comfy.model_patcher.ModelPatcher, adapter: Adapter, info: ModelInfo) -> Any:
    """The core's model_config of the DC-Gen model."""
    config = copied_config(model.model.model_config)
    channels = info.space.channels
    config.unet_config.update(in_channels=channels, out_channels=channels, patch_size=info.patch_size)
    config.latent_format = latent_format(info.space)
    return config


def finish(model: comfy.model_base.BaseModel, info: ModelInfo) -> None:
    """What the latent decides on a BaseModel beyond its network: memory per latent pixel, shift, and its own info."""
    model.memory_usage_factor = type(model.model_config).memory_usage_factor * PATCH_OF_ESTIMATE**2 / info.patch_size**2
    model.dcgen, model.dcgen_family = info, FLUX.name
    params = getattr(model.diffusion_model, "params", None)  # nunchaku's wrapper has none
    model.dcgen_text_width = getattr(params, "context_in_dim", None)
    if isinstance(model.model_sampling, comfy.model_sampling.ModelSamplingFlux):
        model.model_sampling.set_parameters(shift=default_mu(info))


def default_mu(info: ModelInfo) -> float:
    """The shift that core schedulers use for this model: its rule at the size it was made for.

    Core schedulers cannot know the image size; DCGenScheduler does.
    """
    return math.log(shift_ratio(tokens=info.native_tokens, channels=info.token_channels, **info.schedule))

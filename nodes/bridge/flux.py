# C latent channels, D width, p patch size
"""FLUX in ComfyUI: our own weights as a MODEL, and a DC-Gen adapter on somebody else's MODEL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import comfy.ldm.flux.model
import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import torch
from torch import Tensor

from ...dcgen.adapter import Adapter
from ...dcgen.backbones import BACKBONES
from ...dcgen.schedule import shift_ratio
from . import nunchaku
from .latent_format import ModelInfo, latent_format
from .shared import borrow, borrowing_patcher, copied_config, linear

FLUX = BACKBONES["flux"]
# The core's memory estimate counts latent pixels and was tuned on FLUX's 2x2 patches.
PATCH_OF_ESTIMATE = 2


def base_config(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """The diffusers config of a MODEL's FLUX network, as far as the latent does not matter."""
    if nunchaku.is_nunchaku(model):
        return nunchaku.base_config(model)
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


def check_adapter(adapter: Adapter, model: comfy.model_patcher.ModelPatcher, name: str) -> None:
    """ValueError unless the adapter was made for this base; nothing has been computed by then."""
    if adapter.backbone != FLUX.name:
        raise ValueError(
            f"{name} is an adapter for {adapter.backbone!r} models, and DCGenApply was given FLUX. "
            f"Choose an adapter made for FLUX."
        )
    known = getattr(model.model, "dcgen", None)
    if isinstance(known, ModelInfo) and known.patch_size == 1:
        raise ValueError(
            f"this MODEL already runs on {known.space.name or 'a deep latent'}; {name} belongs on the base model. "
            f"Connect the base's loader to DCGenApply."
        )
    adapter.check_base(FLUX.fingerprint(base_config(model)), f"the MODEL given to DCGenApply with {name}")


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher, adapter: Adapter, strength: float, name: str = "the adapter"
) -> comfy.model_patcher.ModelPatcher:
    """The DC-Gen MODEL: `model`'s blocks with the adapter's embedder and head, and its LoRA at `strength`.

    `model` is not changed and shares its weights with the result. strength 0 = alignment only.
    """
    check_adapter(adapter, model, name)
    info = ModelInfo(adapter.latent, adapter.patch_size, dict(adapter.schedule), image_side(adapter))
    foreign = nunchaku.is_nunchaku(model)
    if foreign:
        network = nunchaku.network(model, adapter, info, strength)
    else:
        network = _network(model, FLUX.to_native(adapter.tensors, base_config(model), partial=True), info)
    patcher = borrowing_patcher(model, network, _config(model.model.model_config, info))
    finish(patcher.model, info)
    if strength and adapter.lora and not foreign:
        patches = lora_patches(adapter, patcher)
        patcher.add_patches(patches, strength)
    return patcher


def image_side(adapter: Adapter) -> int | None:
    """Image side from the public key modelspec.resolution ("1024x1024"), if the file has it."""
    side = adapter.metadata.get("modelspec.resolution", "").partition("x")[0]
    return int(side) if side.isdecimal() else None


def _network(model: comfy.model_patcher.ModelPatcher, native: Mapping[str, Tensor], info: ModelInfo) -> torch.nn.Module:
    base = model.model.diffusion_model
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in native.items():
        module, _, suffix = key.rpartition(".")
        layers.setdefault(module, {})[suffix] = tensor
    made = {module: linear(weights, dtype, model.offload_device) for module, weights in layers.items()}
    own = {"linear": made.pop("final_layer.linear")}
    if "final_layer.adaLN_modulation.1" in made:
        own["adaLN_modulation"] = torch.nn.Sequential(torch.nn.SiLU(), made.pop("final_layer.adaLN_modulation.1"))
    packed = info.space.channels * info.patch_size**2
    return borrow(
        base,
        img_in=made.pop("img_in"),
        final_layer=borrow(base.final_layer, **own),
        patch_size=info.patch_size,
        in_channels=packed,
        out_channels=packed,
    )


def _config(config: Any, info: ModelInfo) -> Any:
    twin = copied_config(config)
    twin.unet_config.update(
        in_channels=info.space.channels, out_channels=info.space.channels, patch_size=info.patch_size
    )
    twin.latent_format = latent_format(info.space)
    return twin


def finish(model: comfy.model_base.BaseModel, info: ModelInfo) -> None:
    """What the latent decides on a BaseModel beyond its network: memory per latent pixel, shift, and its own info."""
    model.memory_usage_factor = type(model.model_config).memory_usage_factor * PATCH_OF_ESTIMATE**2 / info.patch_size**2
    model.dcgen = info
    if isinstance(model.model_sampling, comfy.model_sampling.ModelSamplingFlux):
        model.model_sampling.set_parameters(shift=default_mu(info))


def default_mu(info: ModelInfo) -> float:
    """The shift that core schedulers use for this model: its rule at the size it was made for.

    Core schedulers cannot know the image size; DCGenScheduler does.
    """
    return math.log(shift_ratio(tokens=info.native_tokens, channels=info.token_channels, **info.schedule))


def lora_patches(adapter: Adapter, patcher: comfy.model_patcher.ModelPatcher) -> dict:
    """The adapter's LoRA as patches by the core's own key names; ValueError names modules the base does not have."""
    tensors: dict[str, Tensor] = {}
    for module, pair in adapter.lora.items():
        tensors[f"transformer.{module}.lora_A.weight"] = pair.A
        tensors[f"transformer.{module}.lora_B.weight"] = pair.B
        tensors[f"transformer.{module}.alpha"] = torch.tensor(float(pair.alpha))
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    unknown = [module for module in adapter.lora if f"transformer.{module}" not in keys]
    if unknown:
        raise ValueError(f"the adapter's LoRA names modules that this base lacks: {', '.join(sorted(unknown)[:8])}")
    return comfy.lora.load_lora(tensors, keys)

# C latent channels, D width, p patch size
"""FLUX in ComfyUI: our own weights as a MODEL, and a DC-Gen adapter on somebody else's MODEL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import comfy.ldm.flux.model
import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from ...dcgen.adapter import Adapter
from ...dcgen.backbones import BACKBONES
from .latent_format import ModelInfo, latent_format
from .shared import borrow, borrowing_patcher, copied_config, linear

T = TypeVar("T")
FLUX = BACKBONES["flux"]
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
    native = FLUX.to_native(adapter.tensors, base_config(model), partial=True)
    info = ModelInfo(adapter.latent, adapter.patch_size, dict(adapter.schedule))
    patcher = borrowing_patcher(model, _network(model, native, info), _config(model.model.model_config, info))
    _finish(patcher.model, info)
    if strength and adapter.lora:
        patches = lora_patches(adapter, patcher)
        patcher.add_patches(patches, strength)
    return patcher


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


def _finish(model: comfy.model_base.BaseModel, info: ModelInfo) -> None:
    """What the latent decides on a BaseModel beyond its network: memory per latent pixel, shift, and its own info."""
    model.memory_usage_factor = type(model.model_config).memory_usage_factor * PATCH_OF_ESTIMATE**2 / info.patch_size**2
    model.dcgen = info
    shift = default_mu(info)
    if shift is not None and hasattr(model.model_sampling, "set_parameters"):
        model.model_sampling.set_parameters(shift=shift)


def default_mu(info: ModelInfo) -> float | None:
    """The shift that core schedulers use for this model: the checkpoint's own if it has one, else FLUX's 1.15 (None).

    Core schedulers cannot know the image size; DCGenScheduler does, and follows the checkpoint's rule.
    """
    if info.schedule.get("mu") is not None:
        return float(info.schedule["mu"])
    if info.schedule.get("shift") is not None:
        return math.log(info.schedule["shift"])
    return None


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


def load_flux(
    weights: Mapping[str, Tensor] | Callable[[], Iterable[dict[str, Tensor]]],
    config: dict[str, Any],
    info: ModelInfo,
    shapes: Mapping[str, Tensor],
    options: dict[str, Any] | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from native-keyed FLUX weights.

    weights: the state dict, or a function that yields it in parts of whole modules (a block at a time: nothing is
    held twice). shapes: every native key with its tensor (meta tensors do). config: diffusers config of the network.
    options: dtype, fp8_optimizations as in comfy.sd.load_diffusion_model.
    """
    options = options or {}
    quantized = any(key.endswith(".comfy_quant") for key in shapes)
    model_config = comfy.model_detection.model_config_from_unet(dict(shapes), "")
    if model_config is None:
        raise ValueError("ComfyUI does not take these weights for a FLUX model; the file may be incomplete")
    p = info.patch_size
    heads = config["num_attention_heads"]
    model_config.unet_config.update(
        num_heads=heads,
        hidden_size=heads * config["attention_head_dim"],
        axes_dim=list(config["axes_dims_rope"]),
        in_channels=config["in_channels"] // p**2,
        out_channels=info.space.channels,
        patch_size=p,
    )
    model_config.latent_format = latent_format(info.space)
    _set_dtype(model_config, shapes, options, quantized)
    model = model_config.get_model(dict(shapes), "").to(comfy.model_management.unet_offload_device())
    for part in weights() if callable(weights) else [dict(weights)]:
        _fill(model.diffusion_model, model_config.process_unet_state_dict(part))
    _finish(model, info)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    load_device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return kind(model, load_device=load_device, offload_device=offload)


def _set_dtype(model_config: Any, shapes: Mapping[str, Tensor], options: dict[str, Any], quantized: bool) -> None:
    device = comfy.model_management.get_torch_device()
    supported = list(model_config.supported_inference_dtypes)
    stored = None if quantized else comfy.utils.weight_dtype(shapes)
    dtype = options.get("dtype") or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(shapes), supported_dtypes=supported, weight_dtype=stored
    )
    cast = comfy.model_management.unet_manual_cast(None if quantized else dtype, device, supported)
    model_config.set_inference_dtype(dtype, cast)
    if options.get("fp8_optimizations"):
        model_config.optimizations["fp8"] = True


def by_module(items: Iterable[T], name: Callable[[T], str]) -> list[list[T]]:
    """Items grouped by the block (or top-level module) that their native key belongs to."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(_module(name(item)), []).append(item)
    return list(groups.values())


def _module(key: str) -> str:
    pieces = key.split(".")
    return ".".join(pieces[: 2 if pieces[0].endswith("_blocks") else 1])


def _fill(network: torch.nn.Module, part: dict[str, Tensor]) -> None:
    """Load whole modules into the network, each strictly: a key too many or too few is an error that names it."""
    for keys in by_module(part, str):
        path = _module(keys[0])
        tensors = {key[len(path) + 1 :]: part[key] for key in keys}
        missing, unexpected = network.get_submodule(path).load_state_dict(tensors, strict=False)
        unexpected = [key for key in unexpected if not key.endswith((".comfy_quant", "_scale", "_scale_2"))]
        if missing or unexpected:
            raise ValueError(f"{path}: missing {sorted(missing)[:8]}, unknown {sorted(unexpected)[:8]}")

"""A DC-Gen adapter on a MODEL, whichever base model that is and whoever loaded it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import comfy.lora
import comfy.model_patcher
import torch
from torch import Tensor

from ...dcgen.adapter import Adapter
from . import flux, nunchaku, sana
from .guard import guarded
from .latent_format import ModelInfo
from .overlay import overlay, overlay_patcher, replace_ends

Patcher = comfy.model_patcher.ModelPatcher


def apply_adapter(model: Patcher, adapter: Adapter, strength: float, name: str = "the adapter") -> Patcher:
    """The DC-Gen MODEL: `model`'s blocks with the adapter's embedder and head, and its LoRA at `strength`.

    `model` is not changed and shares its weights with the result. strength 0 = alignment only. ValueError when the
    adapter is not one for this base; nothing has been computed by then.
    """
    family = sana if sana.is_sana(model) else flux
    foreign = nunchaku.is_nunchaku(model)
    check_adapter(family, adapter, model, name)
    info = ModelInfo(
        adapter.latent, adapter.patch_size, dict(adapter.schedule), image_side(adapter), family.LATENT_LAYERS
    )
    with torch.inference_mode(False):  # inference tensors could not be trained through (TrainLoraNode)
        if foreign:
            network = nunchaku.network(model, adapter, info, strength)
        else:
            network = overlay(model.model.diffusion_model, family.ends(model, adapter, info))
        patcher = overlay_patcher(model, network, family.deep_config(model, adapter, info))
        family.finish(patcher.model, info)
    guarded(patcher)
    init = getattr(model, "cached_patcher_init", None)
    if init is not None and not foreign:
        patcher.cached_patcher_init = (load_by_itself, (init, _replacing(family, adapter, info)))
    if strength and adapter.lora and not foreign:
        patcher.add_patches(lora_patches(adapter, patcher), strength)
    return patcher


def check_adapter(family: ModuleType, adapter: Adapter, model: Patcher, name: str) -> None:
    """ValueError unless the adapter was made for this base."""
    backbone = family.BACKBONE
    if adapter.backbone != backbone.name:
        raise ValueError(
            f"{name} is an adapter for {adapter.backbone!r} models, and DCGenApply was given {backbone.name.upper()}. "
            f"Choose an adapter made for {backbone.name.upper()}."
        )
    family.check_base(model, adapter, name)
    config = nunchaku.base_config(model) if nunchaku.is_nunchaku(model) else family.base_config(model)
    adapter.check_base(backbone.fingerprint(config), f"the MODEL given to DCGenApply with {name}")


def image_side(adapter: Adapter) -> int | None:
    """Image side from the public key modelspec.resolution ("1024x1024"), if the file has it."""
    side = adapter.metadata.get("modelspec.resolution", "").partition("x")[0]
    return int(side) if side.isdecimal() else None


def _replacing(family: ModuleType, adapter: Adapter, info: ModelInfo) -> Callable[[Patcher], Patcher]:
    """A function that makes the DC-Gen model out of a base that nothing else uses."""
    adapter = replace(adapter, lora={})  # that part is in the patches

    def change(patcher: Patcher) -> Patcher:
        made, config = family.ends(patcher, adapter, info), family.deep_config(patcher, adapter, info)
        replace_ends(patcher.model.diffusion_model, made)
        patcher.model.model_config, patcher.model.latent_format = config, config.latent_format
        family.finish(patcher.model, info)
        patcher.size = 0
        return patcher

    return change


def load_by_itself(init: tuple, change: Callable[[Patcher], Patcher], disable_dynamic: bool = False) -> Patcher:
    """What the core calls through `cached_patcher_init`: the base loaded anew (by its own `init`), and changed."""
    load, arguments, *index = init
    made: Any = load(*arguments, disable_dynamic=True) if disable_dynamic else load(*arguments)
    with torch.inference_mode(False):
        return change(made[index[0]] if index else made)


def lora_patches(adapter: Adapter, patcher: Patcher) -> dict:
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

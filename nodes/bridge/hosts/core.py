"""MODELs of ComfyUI's loaders and of ours: the adapter's layers become an overlay on the base's network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import comfy.utils
import torch
from torch import Tensor

from ....dcgen.adapter import Adapter
from ....dcgen.backbones import Config
from ..families import family_of
from ..family import Family
from ..host import Host, Patcher
from ..latent_format import FamilyInfo, latent_format
from ..loader import finish
from ..lora import Names
from ..overlay import (
    ABSENT,
    NETWORK,
    Ends,
    OverlayPatcher,
    copied_config,
    overlay,
    overlay_patcher,
    own_layers,
    replace_ends,
)


class Core(Host):
    """ComfyUI."""

    order = -1
    patcher: ClassVar[type[OverlayPatcher]] = OverlayPatcher

    def recognises(self, model: Patcher) -> bool:
        return True

    def family(self, model: Patcher) -> Family:
        return family_of(model.model)

    def config(self, model: Patcher, family: Family) -> Config:
        return family.config(model.model.diffusion_model)

    def weight(self, model: Patcher, family: Family, config: Config, name: str) -> tuple[Tensor, float] | None:
        rule = family.backbone.rule_of(name, config)
        key = NETWORK + (rule.original if family.original_names else name)
        backup = model.backup.get(key)
        weight = comfy.utils.get_attr(model.model, key) if backup is None else backup.weight
        values = self.values(model.model.get_submodule(key.rpartition(".")[0]), weight)
        if values is None or not family.original_names:
            return values
        joined, bits = values
        return dict(rule.split(joined, family.backbone.width(config)))[name], bits

    def values(self, layer: torch.nn.Module, weight: Any) -> tuple[Tensor, float] | None:
        """(dequantized weight of a layer, bits per stored value); None when that is unknown."""
        if not isinstance(weight, Tensor) or weight.device.type == "meta":
            return None
        if hasattr(weight, "dequantize") and hasattr(weight, "_qdata"):
            stored = weight._qdata
            values = weight.dequantize()
            return values, 8 * stored.nbytes / values.numel()
        return (weight, 8 * weight.dtype.itemsize) if weight.is_floating_point() else None

    def apply(self, model: Patcher, family: Family, adapter: Adapter, info: FamilyInfo, strength: float) -> Patcher:
        with torch.inference_mode(False):  # inference tensors cannot be trained through (TrainLoraNode)
            network = overlay(model.model.diffusion_model, ends(model, family, adapter, info))
            patcher = overlay_patcher(model, network, deep_config(model, family, info), self.patcher)
        init = getattr(model, "cached_patcher_init", None)
        if init is not None:
            patcher.cached_patcher_init = (load_standalone, (init, replacing(family, adapter, info)))
        finish(family, patcher.model, info)
        if strength and adapter.lora:
            patcher.add_patches(Names(family, info.config).patches(adapter.lora), strength)
        return patcher


def ends(model: Patcher, family: Family, adapter: Adapter, info: FamilyInfo) -> Ends:
    """What replaces the base's, by path in the network: the adapter's layers, and plain attributes."""
    tensors, backbone, config = adapter.tensors, family.backbone, family.config(model.model.diffusion_model)
    if family.original_names:
        tensors = backbone.to_original(tensors, info.config, partial=True)
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    replaced = {family.network_name(layer, config): ABSENT for layer in backbone.ends(config).trained}
    return replaced | own_layers(tensors, dtype, model.offload_device) | family.attributes(info.config, info)


def deep_config(model: Patcher, family: Family, info: FamilyInfo) -> Any:
    """Core's model_config of the DC-Gen model."""
    config = copied_config(model.model.model_config)
    config.unet_config.update(family.unet_config(info.config, info))
    config.latent_format = latent_format(info.space)
    return config


def replacing(family: Family, adapter: Adapter, info: FamilyInfo) -> Callable[[Patcher], Patcher]:
    """A function that turns a base that nothing else uses into the DC-Gen model."""
    adapter = replace(adapter, lora={})  # it is in the patches

    def change(patcher: Patcher) -> Patcher:
        layers, config = ends(patcher, family, adapter, info), deep_config(patcher, family, info)
        replace_ends(patcher.model.diffusion_model, layers)
        patcher.model.model_config, patcher.model.latent_format = config, config.latent_format
        finish(family, patcher.model, info)
        patcher.size = 0
        return patcher

    return change


def load_standalone(init: tuple, change: Callable[[Patcher], Patcher], disable_dynamic: bool = False) -> Patcher:
    """For core's `cached_patcher_init`: load the base again with its own `init`, and apply `change` to it."""
    load, arguments, *index = init
    loaded: Any = load(*arguments, disable_dynamic=True) if disable_dynamic else load(*arguments)
    with torch.inference_mode(False):
        return change(loaded[index[0]] if index else loaded)


HOST = Core()

"""Loads weights of any family as a MODEL: plain or quantized, on any latent, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import torch
from torch import Tensor

from ...dcgen.backbones import Config
from ...dcgen.files import meta_tensors
from ...dcgen.latent import LatentSpace
from ...dcgen.release import Model
from ...dcgen.schedule import Schedule
from . import lora
from .families import FAMILIES, titles
from .family import Family
from .guard import guarded
from .latent_format import FamilyInfo, latent_format
from .loading import Parts, by_layer, fill, is_dynamic, mapped, new_patcher, set_dtype


@dataclass(frozen=True)
class Weights:
    """Weights by the names of ComfyUI's network: all shapes (meta tensors suffice), and the tensors layer by layer.

    parts: gets whether read-only tensors in core's memory map of the files will do, which are only read when used.
    """

    path: Path
    shapes: Mapping[str, Tensor]
    parts: Callable[[bool], Parts]


@torch.inference_mode(False)  # inference tensors cannot be trained through (TrainLoraNode)
def load(
    source: Model, options: Mapping[str, Any] | None = None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from weights in either naming, read one layer at a time: no weight is in memory twice.

    source: its latent must be known; options: dtype, fp8_optimizations, custom_operations as in
    comfy.sd.load_diffusion_model. ValueError names what does not fit.
    """
    family = FAMILIES.get(source.backbone.name)
    if family is None:
        raise ValueError(f"{source.tensors.path} is a {source.backbone.name} model; this node loads {titles('and')}.")
    if source.latent is None or source.schedule is None:
        raise ValueError(f"{source.tensors.path} does not say which autoencoder its latents come from")
    info = info_for(family, source.latent, source.patch_size, source.schedule, source.config, source.native_pixels)
    return build(family, _plain_weights(source, family), info, options or {}, disable_dynamic)


def _plain_weights(source: Model, family: Family) -> Weights:
    rules = {}
    entries = source.entries
    if family.original_names:
        plan = list(source.original_entries(entries))
        rules = {rule.original: rule for rule, _ in plan}
        entries = {entry.name: entry for _, entry in plan}

    def parts(lazy: bool) -> Parts:
        model = replace(source, tensors=mapped(source.tensors)) if lazy else source

        def tensor(name: str) -> Tensor:
            if not rules:
                return model.get(name)
            # What is joined is new memory: its parts would stay in the map beside it.
            reader = source if len(rules[name].parts) > 1 else model
            return reader.get_original(rules[name])

        for names in by_layer(entries):
            yield {name: tensor(name) for name in names}

    return Weights(source.tensors.path, meta_tensors(entries.values()), parts)


def info_for(
    family: Family,
    space: LatentSpace,
    patch_size: int,
    schedule: Schedule,
    config: Config,
    pixels: int | None = None,
) -> FamilyInfo:
    """The FamilyInfo of a MODEL with this config and latent."""
    return FamilyInfo(
        space,
        patch_size,
        pixels=pixels,
        schedule=schedule,
        family=family.backbone.name,
        config=config,
        latent_layers=family.network_layers(config),
    )


def build(
    family: Family, weights: Weights, info: FamilyInfo, options: Mapping[str, Any], disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The BaseModel with its weights, and its patcher."""
    model_config = family.model_config(weights.shapes, info.config)
    if model_config is None:
        raise ValueError(
            f"{weights.path}: ComfyUI does not recognise these weights as a {family.backbone.title} model."
        )
    model_config.unet_config.update(family.unet_config(info.config, info))
    model_config.latent_format = latent_format(info.space)
    set_dtype(model_config, weights.shapes, options)
    model = model_config.get_model(dict(weights.shapes), "").to(comfy.model_management.unet_offload_device())
    family.prepare(model)
    patcher = new_patcher(model, disable_dynamic)
    lazy = is_dynamic(patcher)
    fill(model.diffusion_model, _renamed(family, weights.parts(lazy), model_config), weights.path, lazy)
    finish(family, model, info)
    on_base_latent = info.space.spatial_factor == family.backbone.base_spatial_factor
    return guarded(patcher if on_base_latent else lora.with_report(patcher))


def _renamed(family: Family, parts: Iterable[dict[str, Tensor]], model_config: Any) -> Iterator[dict[str, Tensor]]:
    for part in parts:
        yield family.renamed(part, model_config)
        part.clear()


def finish(family: Family, model: comfy.model_base.BaseModel, info: FamilyInfo) -> None:
    """Set what depends on the latent on a BaseModel beside its network: memory estimate, shift, info, LoRA names."""
    model.memory_usage_factor = family.memory_factor(model, info.config, info)
    model.dcgen = info
    model.dcgen_lora_names = lora.Names(family, info.config)
    # Core schedulers do not know the image size: they get the shift of the native resolution.
    ratio = info.schedule.ratio(tokens=info.native_tokens, channels=info.token_channels)
    if isinstance(model.model_sampling, comfy.model_sampling.ModelSamplingFlux):
        model.model_sampling.set_parameters(shift=math.log(ratio))
    elif isinstance(model.model_sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        model.model_sampling.set_parameters(shift=ratio, multiplier=model.model_sampling.multiplier)

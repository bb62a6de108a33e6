"""Applies a DC-Gen adapter to a MODEL of any family and any loader."""

from __future__ import annotations

from dataclasses import replace

from ...dcgen.adapter import Adapter
from ...dcgen.backbones import Config
from ...dcgen.latent import LatentSpace
from .family import Family
from .guard import guarded
from .host import Host, Patcher
from .hosts import host_of
from .latent_format import FamilyInfo, ModelInfo
from .loader import info_for
from .model_info import info_of


def apply_adapter(model: Patcher, adapter: Adapter, strength: float, name: str = "the adapter") -> Patcher:
    """The DC-Gen MODEL: `model`'s blocks with the adapter's embedder and head, and its LoRA at `strength`.

    `model` is not changed and shares its weights with the result. strength 0 = alignment only. ValueError, before
    any compute, when the adapter is for another base.
    """
    host = host_of(model)
    family = host.family(model)
    config = check_adapter(host, family, adapter, model, name)
    new_config = family.backbone.config_with_latent(config, adapter.latent.channels, adapter.patch_size)
    info = info_for(family, adapter.latent, adapter.patch_size, adapter.schedule, new_config, image_side(adapter))
    return guarded(host.apply(model, family, adapter, info, strength))


def check_adapter(host: Host, family: Family, adapter: Adapter, model: Patcher, name: str) -> Config:
    """The config of the base; ValueError unless the adapter was made for it."""
    title = family.backbone.title
    if adapter.backbone != family.backbone.name:
        raise ValueError(
            f"{name} is an adapter for {adapter.backbone!r} models, and Apply DC-Gen was given {title}. "
            f"Choose an adapter made for {title}."
        )
    source = f"the MODEL given to Apply DC-Gen with {name}"
    config = host.config(model, family)
    adapter.check_base(family.backbone.base_signature(config), source)
    adapter.check_base_latent(_base_space(info_of(model), adapter), source)
    adapter.check_weights(*host.identity(model, family, config), source)
    return config


def _base_space(info: ModelInfo, adapter: Adapter) -> LatentSpace:
    """The latent space of a MODEL. Of a MODEL from another loader only channels and spatial factor are known; the rest
    is assumed to be that of the base's own autoencoder.
    """
    expected = adapter.base_latent
    if isinstance(info, FamilyInfo) or expected is None:
        return info.space
    if expected.channels != info.space.channels:
        return info.space
    return replace(expected, spatial_factor=info.space.spatial_factor)


def image_side(adapter: Adapter) -> int | None:
    """Image side from the public key modelspec.resolution ("1024x1024"), if the file has it."""
    side = adapter.metadata.get("modelspec.resolution", "").partition("x")[0]
    return int(side) if side.isdecimal() else None

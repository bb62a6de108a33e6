"""A DC-Gen adapter on a MODEL, whichever base model that is."""

from __future__ import annotations

import comfy.model_patcher

from ...dcgen.adapter import Adapter
from . import flux, sana


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher, adapter: Adapter, strength: float, name: str = "the adapter"
) -> comfy.model_patcher.ModelPatcher:
    """The DC-Gen MODEL of a base and its adapter; ValueError when the adapter is not one for this base."""
    kind = sana if sana.is_sana(model) else flux
    return kind.apply_adapter(model, adapter, strength, name)

"""The base models that the method knows. A new one is a file here and a line in BACKBONES."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .base import Backbone, Config
from .dit import DiT
from .flux import Flux
from .sana import Sana

BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in (Flux(), Sana(), DiT())}


def detect_backbone(state_dict: Mapping[str, Tensor]) -> tuple[Backbone, Config]:
    """The model that a state dict (either naming, any known prefix) belongs to, and its config."""
    for backbone in BACKBONES.values():
        if backbone.matches(state_dict):
            return backbone, backbone.detect(state_dict)
    raise ValueError(
        f"no known model has these keys (first: {', '.join(sorted(state_dict)[:4])}); known: {', '.join(BACKBONES)}"
    )


__all__ = ["BACKBONES", "Backbone", "Config", "detect_backbone"]

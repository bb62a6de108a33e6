"""The base models that the method knows. A new one is a file here and a line in BACKBONES."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..fields import shown
from ..kinds import what_it_may_be
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
    first = ", ".join(shown(key) for key in sorted(state_dict)[:4])
    advice = what_it_may_be(state_dict, f"Known are {', '.join(BACKBONES)}.")
    raise ValueError(f"no known model has these keys (first: {first}). {advice}")


__all__ = ["BACKBONES", "Backbone", "Config", "detect_backbone"]

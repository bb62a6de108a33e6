"""The known base models and how to detect them. To add one, add a module with a BACKBONE to this folder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..fields import shown
from ..kinds import is_controlnet, what_it_may_be
from ..registry import modules_with
from .base import Backbone, Config, Ends

BACKBONES: dict[str, Backbone] = {
    module.BACKBONE.name: module.BACKBONE for module in modules_with("BACKBONE", __name__, __path__)
}


def detect_backbone(state_dict: Mapping[str, Tensor]) -> tuple[Backbone, Config]:
    """The model that a state dict (either naming, any known prefix) belongs to, and its config."""
    for backbone in () if is_controlnet(state_dict) else BACKBONES.values():
        if backbone.matches(state_dict):
            return backbone, backbone.detect(state_dict)
    examples = ", ".join(shown(key) for key in sorted(state_dict)[:4])
    advice = what_it_may_be(state_dict, f"Known are {', '.join(BACKBONES)}.")
    raise ValueError(f"no known model has these keys (first: {examples}). {advice}")


__all__ = ["BACKBONES", "Backbone", "Config", "Ends", "detect_backbone"]

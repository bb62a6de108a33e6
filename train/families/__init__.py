"""The families that can be trained, by the name of their backbone. A new one is a module here with a FAMILY."""

from __future__ import annotations

from dcgen.backbones import Backbone
from dcgen.registry import modules_with
from train.family import Architecture, Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.backbone.name: module.FAMILY for module in modules_with("FAMILY", __name__, __path__)
}
ARCHITECTURES: dict[str, tuple[Family, Architecture]] = {
    name: (family, architecture) for family in FAMILIES.values() for name, architecture in family.architectures.items()
}
DEFAULT = "flux"
"""Whose base a recipe gets that makes one and names no family."""


def family_of(backbone: Backbone) -> Family:
    """The training side of a backbone; ValueError for one that can be read but not trained."""
    if backbone.name not in FAMILIES:
        raise ValueError(f"{backbone.title} cannot be trained here; known: {', '.join(FAMILIES)}")
    return FAMILIES[backbone.name]

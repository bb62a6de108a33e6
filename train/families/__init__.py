"""The families that can be trained, by the name of their backbone. A new one is a module here with a FAMILY."""

from __future__ import annotations

from dcgen.registry import modules_with
from train.family import Architecture, Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.backbone.name: module.FAMILY for module in modules_with("FAMILY", __name__, __path__)
}
ARCHITECTURES: dict[str, tuple[Family, Architecture]] = {
    name: (family, architecture) for family in FAMILIES.values() for name, architecture in family.architectures.items()
}

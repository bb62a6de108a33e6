"""The families that run in ComfyUI, by backbone name. To add one, add a module with a FAMILY to this folder."""

from __future__ import annotations

from typing import Any

from ....dcgen.backbones import Config
from ....dcgen.registry import modules_with
from ..family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.backbone.name: module.FAMILY for module in modules_with("FAMILY", __name__, __path__)
}


def titles(conjunction: str) -> str:
    """The titles of all families: "FLUX.1 or SANA"."""
    *names, last = [family.backbone.title for family in FAMILIES.values()]
    return f"{', '.join(names)} {conjunction} {last}" if names else last


def family_of(model: Any) -> Family:
    """The family of a BaseModel with ComfyUI's own layers; ValueError names its classes when there is none."""
    for family in FAMILIES.values():
        if family.recognises(model):
            return family
    raise ValueError(
        f"Apply DC-Gen needs a {titles('or')} model; this MODEL is a {type(model).__name__} "
        f"({type(model.diffusion_model).__name__}). Load one of those and connect that."
    )


def family_of_config(config: Config) -> Family | None:
    """The family that has these fields in its diffusers config, whatever the class is named; None if there is none."""
    for family in FAMILIES.values():
        if all(field in config for field in (*family.backbone.signature_fields, "attention_head_dim")):
            return family
    return None


def family_of_class(name: Any) -> Family:
    """The family of a diffusers class; ValueError lists the known ones."""
    for family in FAMILIES.values():
        if family.backbone.diffusers_class == name:
            return family
    supported = " and ".join(f"{f.backbone.diffusers_class} ({f.backbone.title})" for f in FAMILIES.values())
    raise ValueError(f"its transformer is a {name}; this node loads {supported}.")

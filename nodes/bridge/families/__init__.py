"""The families that ComfyUI can run, by the name of their backbone. A new one is a module here with a FAMILY."""

from __future__ import annotations

from typing import Any

from ....dcgen.backbones import Config
from ....dcgen.registry import modules_with
from ..family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.backbone.name: module.FAMILY for module in modules_with("FAMILY", __name__, __path__)
}


def titles(joint: str) -> str:
    """The families' names in words."""
    *names, last = [family.backbone.title for family in FAMILIES.values()]
    return f"{', '.join(names)} {joint} {last}" if names else last


def family_of(model: Any) -> Family:
    """The family of a BaseModel with ComfyUI's own layers; ValueError names what it is otherwise."""
    for family in FAMILIES.values():
        if family.recognises(model):
            return family
    raise ValueError(
        f"DCGenApply needs a {titles('or')} model; this MODEL is a {type(model).__name__} "
        f"({type(model.diffusion_model).__name__}). Load one of those and connect that."
    )


def family_of_config(config: Config) -> Family | None:
    """The family whose networks have a config with these fields (a diffusers config, whatever the class is called)."""
    for family in FAMILIES.values():
        if all(field in config for field in (*family.backbone.signature_fields, "attention_head_dim")):
            return family
    return None


def family_of_class(name: Any) -> Family:
    """The family of a diffusers class; ValueError lists those there are."""
    for family in FAMILIES.values():
        if family.backbone.diffusers_class == name:
            return family
    known = " and ".join(f"{f.backbone.diffusers_class} ({f.backbone.title})" for f in FAMILIES.values())
    raise ValueError(f"its transformer is a {name}; this node loads {known}.")

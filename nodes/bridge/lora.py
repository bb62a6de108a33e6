"""LoRA that users put on a DC-Gen MODEL: what of it fits, what cannot, and a line in the log that says so.

A LoRA trained on plain FLUX changes the blocks, which DC-Gen shares, and sometimes the embedder and head, which belong
to the f8 latent. Those few are left out here; the core would try them at each load and print an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import comfy.model_patcher

NETWORK = "diffusion_model."
# Core's name of a layer that depends on the latent -> the name that LoRA files use.
PUBLIC = {"img_in": "x_embedder", "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
Patches = dict[Any, Any]


@dataclass(frozen=True)
class LoraReport:
    """Weights by core's name: changed, left out because their shape is another here, not in this model at all."""

    applied: tuple[str, ...]
    misfits: tuple[str, ...]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        whole = len(self.applied) + len(self.misfits) + len(self.unknown)
        text = f"LoRA on a DC-Gen model: {len(self.applied)} of {whole} changes applied."
        if self.misfits:
            text += f" Left out, made for another latent: {', '.join(map(_public, self.misfits))}."
        if self.unknown:
            more = f" and {len(self.unknown) - 8} more" if len(self.unknown) > 8 else ""
            text += f" Not in this model: {', '.join(map(_public, self.unknown[:8]))}{more}."
        if not self.applied:
            text += " A nunchaku model takes LoRA from nunchaku's own loader only, placed before Apply DC-Gen."
        return text


def split_patches(patches: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Patches, tuple[str, ...]]:
    """(patches that can be applied, weights of those that cannot).

    patches: as comfy.lora.load_lora makes them; shapes: of the weights that depend on the latent. A layer of which one
    change does not fit is left out whole: its bias alone would mean nothing.
    """
    bad = {
        _layer(key) for key, patch in patches.items() if _name(key) in shapes and not _fits(patch, shapes[_name(key)])
    }
    kept = {key: patch for key, patch in patches.items() if _layer(key) not in bad}
    return kept, _names(key for key in patches if _layer(key) in bad)


def report(patches: Mapping[Any, Any], misfits: Iterable[str], added: Iterable[Any]) -> LoraReport:
    """What became of `patches`, given what add_patches said it `added`."""
    applied, left = _names(added), tuple(misfits)
    return LoraReport(applied, left, tuple(name for name in _names(patches) if name not in {*applied, *left}))


def log(said: LoraReport) -> None:
    """One line, a warning when something was left out."""
    whole = said.applied and not said.misfits and not said.unknown
    logging.log(logging.INFO if whole else logging.WARNING, "%s", said)


class Reporting:
    """Mixin for the ModelPatcher of a DC-Gen model: LoRA without what was made for another latent, with a report."""

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that a LoRA for another latent cannot change."""
        return latent_shapes(self.model)

    def add_patches(self, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """As the core's; says in the log what was applied and what was left out."""
        return self._reported(patches, self._add_patches, strength_patch, strength_model)

    def add_hook_patches(
        self, hook: Any, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        """The same for LoRA that come with a conditioning (Create Hook LoRA), which the core swaps while it samples."""
        add = partial(super().add_hook_patches, hook)
        return self._reported(patches, add, strength_patch, strength_model)

    def _add_patches(self, patches: Mapping, *strengths: float) -> list:
        return super().add_patches(patches, *strengths)

    def _reported(self, patches: Mapping, add: Callable[..., list], *strengths: float) -> list:
        kept, misfits = split_patches(patches, self.latent_shapes())
        added = add(kept, *strengths)
        log(report(patches, misfits, added))
        return added


@cache
def reporting(kind: type[comfy.model_patcher.ModelPatcher]) -> type[comfy.model_patcher.ModelPatcher]:
    """The patcher class `kind` with a LoRA report."""
    return type(kind.__name__, (Reporting, kind), {})


def latent_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that depend on the latent: embedder, head and the modulation before it."""
    places = tuple(f"{NETWORK}{layer}." for layer in PUBLIC)
    return {name: tuple(value.shape) for name, value in model.named_parameters() if name.startswith(places)}


def _fits(patch: Any, shape: tuple[int, ...]) -> bool:
    """Whether a LoRA or a plain difference has this shape. Patches of other kinds are the core's business."""
    if isinstance(patch, tuple) and patch[0] == "diff":
        return tuple(patch[1][0].shape) == shape
    weights = getattr(patch, "weights", None)
    if weights is None or getattr(patch, "name", "") != "lora" or len(shape) != 2:
        return True
    return (weights[0].shape[0], weights[1].flatten(1).shape[1]) == shape


def _name(key: Any) -> str:
    """A patch's weight; the core's key may be (weight, slice, function)."""
    return key if isinstance(key, str) else key[0]


def _layer(key: Any) -> str:
    return _name(key).rpartition(".")[0]


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(set(map(_name, keys))))  # the core's own order changes from run to run


def _public(name: str) -> str:
    layer = _layer(name).removeprefix(NETWORK)
    return f"{layer} ({PUBLIC[layer]})" if layer in PUBLIC else layer

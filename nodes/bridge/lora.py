"""LoRA and merges that users put on a DC-Gen MODEL: what fits, what cannot, and a line in the log that says so.

A LoRA trained on plain FLUX changes the blocks, which DC-Gen shares, and sometimes the embedder and head, which belong
to the f8 latent. Those few are left out here; the core would try them at each load and print an error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import comfy.lora
import comfy.model_patcher
import torch

NETWORK = "diffusion_model."
WRAPPER = "ComfyFluxWrapper"  # nunchaku's network, by name
# Core's name of a layer that depends on the latent -> the name that LoRA files use.
PUBLIC = {"img_in": "x_embedder", "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
LISTED = 8
Patches = dict[Any, Any]


@dataclass(frozen=True)
class LoraReport:
    """Weights by core's name: changed, left out because their shape is another here, not in this model at all."""

    applied: tuple[str, ...]
    misfits: tuple[str, ...]
    unknown: tuple[str, ...]
    nunchaku: bool = False

    def __str__(self) -> str:
        whole = len(self.applied) + len(self.misfits) + len(self.unknown)
        if not whole:
            return f"LoRA on a DC-Gen model: nothing in it fits, it was made for another kind of model.{self._hint()}"
        text = f"LoRA on a DC-Gen model: {len(self.applied)} of {whole} changes applied."
        if self.misfits:
            text += f" Left out, made for another latent: {', '.join(map(_public, self.misfits))}."
        if self.unknown:
            more = f" and {len(self.unknown) - LISTED} more" if len(self.unknown) > LISTED else ""
            text += f" Not in this model: {', '.join(map(_public, self.unknown[:LISTED]))}{more}."
        return text if self.applied else text + self._hint()

    def _hint(self) -> str:
        if not self.nunchaku:
            return ""
        return " A nunchaku model takes LoRA from nunchaku's own loader only, placed before Apply DC-Gen."


def split_patches(patches: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Patches, tuple[str, ...]]:
    """(patches that can be applied, weights of those that cannot).

    patches: as comfy.lora.load_lora makes them; shapes: of the weights that depend on the latent. A layer of which one
    change does not fit is left out whole: its bias alone would mean nothing.
    """
    bad = {
        _layer(key)
        for key, patch in patches.items()
        if weight_name(key) in shapes and not fits(patch, shapes[weight_name(key)])
    }
    kept = {key: patch for key, patch in patches.items() if _layer(key) not in bad}
    return kept, _names(key for key in patches if _layer(key) in bad)


def fits(patch: Any, shape: tuple[int, ...]) -> bool:
    """Whether the core can apply a patch of any kind (LoRA, LoHa, LoKr, DoRA, OFT, a difference) to such a weight.

    The core is asked: it applies the patch to zeros, and says in its log what it could not do.
    """
    if is_merge(patch):
        return tuple(patch[0][0].shape) == shape
    ears = _Ears()
    logging.getLogger().addFilter(ears)
    try:
        weight = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], torch.zeros(shape), "a weight")
    finally:
        logging.getLogger().removeFilter(ears)
    return not ears.heard and tuple(weight.shape) == shape


class _Ears(logging.Filter):
    """Hears that the core warns in this thread, and keeps it from the log."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.thread = False, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        troubled = record.levelno >= logging.WARNING and record.thread == self.thread
        self.heard |= troubled
        return not troubled


def is_merge(patch: Any) -> bool:
    """Whether a patch is another model's whole weight, as get_key_patches gives it: [(weight, converter), ...]."""
    return isinstance(patch, list)


def report(patches: Mapping[Any, Any], misfits: Iterable[str], added: Iterable[Any], model: Any = None) -> LoraReport:
    """What became of `patches`, given what add_patches said it `added`."""
    applied, left = _names(added), tuple(misfits)
    unknown = tuple(name for name in _names(patches) if name not in {*applied, *left})
    network = getattr(model, "diffusion_model", None)
    return LoraReport(applied, left, unknown, type(network).__name__ == WRAPPER)


def log(said: LoraReport) -> None:
    """One line, a warning when something was left out."""
    whole = said.applied and not said.misfits and not said.unknown
    logging.log(logging.INFO if whole else logging.WARNING, "%s", said)


def log_merge(misfits: Iterable[str]) -> None:
    """A merge comes a weight at a time, and most of them fit: one line for each that does not."""
    for name in misfits:
        logging.warning("Merging into a DC-Gen model: %s is left out, made for another latent.", _public(name))


class Reporting:
    """Mixin for the ModelPatcher of a DC-Gen model: LoRA without what was made for another latent, with a report."""

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that a LoRA for another latent cannot change."""
        places = tuple(f"{NETWORK}{layer}." for layer in self.model.dcgen.latent_layers)
        return {name: tuple(value.shape) for name, value in self.model.named_parameters() if name.startswith(places)}

    def add_patches(self, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """As the core's; says in the log what was applied and what was left out."""
        return self._reported(patches, self._add_patches, strength_patch, strength_model)

    def add_hook_patches(
        self, hook: Any, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        """The same for LoRA that come with a conditioning (Create Hook LoRA), which the core swaps while it samples."""
        add = partial(super().add_hook_patches, hook)
        return self._reported(patches, add, strength_patch, strength_model)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """As the core's, which makes a plain ModelPatcher of a dynamic one."""
        return reported(super().clone(*args, **kwargs))

    def _add_patches(self, patches: Mapping, *strengths: float) -> list:
        return super().add_patches(patches, *strengths)

    def _reported(self, patches: Mapping, add: Callable[..., list], *strengths: float) -> list:
        kept, misfits = split_patches(patches, self.latent_shapes())
        added = add(kept, *strengths)
        if patches and all(map(is_merge, patches.values())):
            log_merge(misfits)
        else:
            log(report(patches, misfits, added, self.model))
        return added


@cache
def _reporting(kind: type[comfy.model_patcher.ModelPatcher]) -> type[comfy.model_patcher.ModelPatcher]:
    return type(kind.__name__, (Reporting, kind), {})


def reported(patcher: Any) -> Any:
    """The same patcher, with a LoRA report from now on."""
    if not isinstance(patcher, Reporting):
        # Not another class at construction: the core's dynamic patcher chooses its own class there.
        patcher.__class__ = _reporting(type(patcher))
    return patcher


def weight_name(key: Any) -> str:
    """A patch's weight; the core's key may be (weight, slice, function)."""
    return key if isinstance(key, str) else key[0]


def _layer(key: Any) -> str:
    return weight_name(key).rpartition(".")[0]


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(set(map(weight_name, keys))))  # the core's own order changes from run to run


def _public(name: str) -> str:
    layer = _layer(name).removeprefix(NETWORK)
    return f"{layer} ({PUBLIC[layer]})" if layer in PUBLIC else layer

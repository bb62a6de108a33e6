"""Users' LoRA and merges on a DC-Gen MODEL: apply what fits, leave out the rest, and log one line about it.

A LoRA trained on plain FLUX changes the blocks, which DC-Gen shares, and sometimes the embedder and head, which depend
on the f8 latent. The latter are left out here; core would try them at each load and log an error each time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial, wraps
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_patcher
import torch
from torch import Tensor

from ...dcgen.adapter import LoraPair
from ...dcgen.backbones import Config
from .family import Family

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher as PatcherMixin  # the class that the mixins extend
else:
    PatcherMixin = object

NETWORK = "diffusion_model."
LISTED = 8
WRAPPED = "dcgen"  # attribute of core's function after register() has wrapped it
Patches = dict[Any, Any]


class Names:
    """The names that LoRA files use for the layers of a family's network, from the rows of its key map."""

    def __init__(self, family: Family, config: Config) -> None:
        self.family, self.config = family, config

    @cached_property
    def targets(self) -> dict[str, Any]:
        """Module path in the diffusers network -> its weight as core's patches name it: the key, or
        (key, (dimension, first row, rows)) when several modules are joined in one weight, or (key, None, function).
        """
        backbone, config = self.family.backbone, self.config
        shapes = backbone.shapes(config)
        targets: dict[str, Any] = {}
        for rule in backbone.key_map(config).rules(backbone.depths(config)):
            weights = [part for part in rule.parts if part.endswith(".weight") and part in shapes]
            if not self.family.original_names:
                targets |= {_layer(weight): NETWORK + weight for weight in weights}
                continue
            key, start = NETWORK + rule.original, 0
            for weight in weights if key.endswith(".weight") else ():
                rows = shapes[weight][0]
                joined = (key, (0, start, rows)) if len(rule.parts) > 1 and not rule.copied else key
                targets[_layer(weight)] = (key, None, _swapped) if rule.swap else joined
                start += rows
        return targets

    @cached_property
    def aliases(self) -> dict[str, Any]:
        """Names in LoRA files of trainers that use diffusers' module names -> the same targets."""
        aliases: dict[str, Any] = {}
        for layer, target in self.targets.items():
            flat = layer.replace(".", "_")
            names = (layer, f"transformer.{layer}", f"lycoris_{flat}", f"lora_transformer_{flat}")
            aliases |= dict.fromkeys(names, target)
        return aliases

    def patches(self, lora: Mapping[str, LoraPair]) -> Patches:
        """An adapter's LoRA as core's patches; ValueError names modules that the network does not have."""
        unknown = [module for module in lora if module not in self.targets]
        if unknown:
            raise ValueError(f"the adapter's LoRA names modules that this base lacks: {', '.join(sorted(unknown)[:8])}")
        tensors: dict[str, Tensor] = {}
        for module, pair in lora.items():
            tensors |= {f"{module}.lora_A.weight": pair.A, f"{module}.lora_B.weight": pair.B}
            tensors[f"{module}.alpha"] = torch.tensor(float(pair.alpha))
        return comfy.lora.load_lora(tensors, {module: self.targets[module] for module in lora})


def _swapped(weight: Tensor) -> Tensor:
    """A weight change with the two halves of its rows swapped, for key map rows with `swap`."""
    return torch.cat(weight.chunk(2, dim=0)[::-1], dim=0)


def register() -> None:
    """Make core's LoRA loaders find the names of our models' layers. Core only knows its own classes and does not ask
    the model; for all other models the result is unchanged.
    """
    core = comfy.lora.model_lora_keys_unet
    if getattr(core, WRAPPED, False):
        return

    @wraps(core)
    def model_lora_keys_unet(model: Any, key_map: dict[str, Any] | None = None) -> dict[str, Any]:
        keys = core(model, {} if key_map is None else key_map)
        names = getattr(model, "dcgen_lora_names", None)
        for alias, target in names.aliases.items() if names is not None else ():
            keys.setdefault(alias, target)
        return keys

    setattr(model_lora_keys_unet, WRAPPED, True)
    comfy.lora.model_lora_keys_unet = model_lora_keys_unet


@dataclass(frozen=True)
class LoraReport:
    """What happened to a LoRA, as weights by core's name: applied, left out for their shape, or not in this model.

    public: names in LoRA files of the layers that depend on the latent; hint: the remedy when nothing was applied.
    """

    applied: tuple[str, ...]
    mismatched: tuple[str, ...]
    unknown: tuple[str, ...]
    public: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""

    def __str__(self) -> str:
        total = len(self.applied) + len(self.mismatched) + len(self.unknown)
        if not total:
            return f"LoRA on a DC-Gen model: nothing in it fits, it was made for another kind of model.{self.hint}"
        text = f"LoRA on a DC-Gen model: {len(self.applied)} of {total} changes applied."
        if self.mismatched:
            text += f" Left out, made for another latent: {', '.join(map(self._named, self.mismatched))}."
        if self.unknown:
            rest = f" and {len(self.unknown) - LISTED} more" if len(self.unknown) > LISTED else ""
            text += f" Not in this model: {', '.join(map(self._named, self.unknown[:LISTED]))}{rest}."
        return text if self.applied else text + self.hint

    def _named(self, name: str) -> str:
        return public_name(name, self.public)


def split_patches(patches: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Patches, tuple[str, ...]]:
    """(patches that can be applied, weights of those that cannot).

    patches: as comfy.lora.load_lora makes them; shapes: of the weights that depend on the latent. When one change of a
    layer does not fit, all changes of that layer are left out: its bias is useless without its weight.
    """
    rejected = {
        _layer(key)
        for key, patch in patches.items()
        if weight_name(key) in shapes and not fits(patch, shapes[weight_name(key)])
    }
    applicable = {key: patch for key, patch in patches.items() if _layer(key) not in rejected}
    return applicable, _names(key for key in patches if _layer(key) in rejected)


def fits(patch: Any, shape: tuple[int, ...]) -> bool:
    """Whether core can apply a patch of any kind (LoRA, LoHa, LoKr, DoRA, OFT, a difference) to a weight of this shape.

    Core itself tries it on zeros; it logs a warning when it fails.
    """
    if is_merge(patch):
        return tuple(patch[0][0].shape) == shape
    warnings = _WarningFilter()
    logging.getLogger().addFilter(warnings)
    try:
        weight = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], torch.zeros(shape), "a weight")
    finally:
        logging.getLogger().removeFilter(warnings)
    return not warnings.seen and tuple(weight.shape) == shape


class _WarningFilter(logging.Filter):
    """Notices warnings of this thread and keeps them out of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.thread = False, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        warning = record.levelno >= logging.WARNING and record.thread == self.thread
        self.seen |= warning
        return not warning


def is_merge(patch: Any) -> bool:
    """Whether a patch is another model's whole weight, as get_key_patches gives it: [(weight, converter), ...]."""
    return isinstance(patch, list)


def report(
    patches: Mapping[Any, Any], mismatched: Iterable[str], added: Iterable[Any], model: Any = None
) -> LoraReport:
    """The report on `patches`, given the keys that add_patches returned as `added`."""
    applied, skipped = _names(added), tuple(mismatched)
    unknown = tuple(name for name in _names(patches) if name not in {*applied, *skipped})
    info = getattr(model, "dcgen", None)
    hint = getattr(getattr(model, "diffusion_model", None), "dcgen_lora_hint", "")
    return LoraReport(applied, skipped, unknown, getattr(info, "latent_layers", None) or {}, hint)


def log(report: LoraReport) -> None:
    """Log one line, a warning when something was left out."""
    complete = report.applied and not report.mismatched and not report.unknown
    logging.log(logging.INFO if complete else logging.WARNING, "%s", report)


def log_merge(mismatched: Iterable[str], public: Mapping[str, str]) -> None:
    """Log one line per weight left out of a merge: core adds merges one weight at a time, and most fit."""
    for name in mismatched:
        logging.warning(
            "Merging into a DC-Gen model: %s is left out, made for another latent.", public_name(name, public)
        )


class Reporting(PatcherMixin):
    """Mixin for the ModelPatcher of a DC-Gen model: leaves out LoRA changes for another latent, and logs a report."""

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that depend on the latent."""
        paths = tuple(f"{NETWORK}{layer}." for layer in self.model.dcgen.latent_layers)
        return {name: tuple(value.shape) for name, value in self.model.named_parameters() if name.startswith(paths)}

    def add_patches(self, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """As in core; logs what was applied and what was left out."""
        return self._reported(patches, self._add_patches, strength_patch, strength_model)

    def add_hook_patches(
        self, hook: Any, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        """The same for LoRA on a conditioning (Create Hook LoRA), which core swaps during sampling."""
        add = partial(super().add_hook_patches, hook)
        return self._reported(patches, add, strength_patch, strength_model)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """As in core, which turns a dynamic patcher into a plain ModelPatcher."""
        return with_report(super().clone(*args, **kwargs))

    def _add_patches(self, patches: Mapping, *strengths: float) -> list:
        return super().add_patches(patches, *strengths)

    def _reported(self, patches: Mapping, add: Callable[..., list], *strengths: float) -> list:
        applicable, mismatched = split_patches(patches, self.latent_shapes())
        added = add(applicable, *strengths)
        if patches and all(map(is_merge, patches.values())):
            log_merge(mismatched, self.model.dcgen.latent_layers)
        else:
            log(report(patches, mismatched, added, self.model))
        # Core logs another warning for each change that is not in the returned list.
        return [*added, *(key for key in patches if key not in applicable)]


@cache
def _reporting(kind: Any) -> type:
    return type(kind.__name__, (Reporting, kind), {})


def with_report(patcher: Any) -> Any:
    """The same patcher, with a LoRA report."""
    if not isinstance(patcher, Reporting):
        # Set after construction: core's dynamic patcher chooses its own class when it is constructed.
        kind: Any = type(patcher)
        patcher.__class__ = _reporting(kind)
    return patcher


def weight_name(key: Any) -> str:
    """The weight of a patch; core's key may be (weight, slice, function)."""
    return key if isinstance(key, str) else key[0]


def _layer(key: Any) -> str:
    return weight_name(key).rpartition(".")[0]


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(set(map(weight_name, keys))))  # core's order differs from run to run


def public_name(name: str, public: Mapping[str, str]) -> str:
    """A layer by core's name, and in brackets the name in LoRA files if it differs."""
    layer = _layer(name).removeprefix(NETWORK)
    return f"{layer} ({public[layer]})" if public.get(layer, layer) != layer else layer

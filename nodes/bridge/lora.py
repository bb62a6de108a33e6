"""LoRA and merges that users put on a DC-Gen MODEL: what fits, what cannot, and a line in the log that says so.

A LoRA trained on plain FLUX changes the blocks, which DC-Gen shares, and sometimes the embedder and head, which belong
to the f8 latent. Those few are left out here; the core would try them at each load and print an error.
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
    from comfy.model_patcher import ModelPatcher as PatcherMixin  # whose methods the mixins call
else:
    PatcherMixin = object

NETWORK = "diffusion_model."
LISTED = 8
MARK = "dcgen"  # on the function of the core that register() wraps
Patches = dict[Any, Any]


class Names:
    """How LoRA files name the layers of a family's network, from the rows of its key map."""

    def __init__(self, family: Family, config: Config) -> None:
        self.family, self.config = family, config

    @cached_property
    def targets(self) -> dict[str, Any]:
        """Module path in the diffusers network -> the weight it is in, as the core's patches name that: its key, or
        (key, (dimension, first row, rows)) of one in which several are joined, or (key, None, function).
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
        """The names in LoRA files of trainers that follow diffusers -> the same."""
        aliases: dict[str, Any] = {}
        for layer, target in self.targets.items():
            flat = layer.replace(".", "_")
            names = (layer, f"transformer.{layer}", f"lycoris_{flat}", f"lora_transformer_{flat}")
            aliases |= dict.fromkeys(names, target)
        return aliases

    def patches(self, lora: Mapping[str, LoraPair]) -> Patches:
        """An adapter's LoRA as the core's patches; ValueError names modules that the network does not have."""
        unknown = [module for module in lora if module not in self.targets]
        if unknown:
            raise ValueError(f"the adapter's LoRA names modules that this base lacks: {', '.join(sorted(unknown)[:8])}")
        tensors: dict[str, Tensor] = {}
        for module, pair in lora.items():
            tensors |= {f"{module}.lora_A.weight": pair.A, f"{module}.lora_B.weight": pair.B}
            tensors[f"{module}.alpha"] = torch.tensor(float(pair.alpha))
        return comfy.lora.load_lora(tensors, {module: self.targets[module] for module in lora})


def _swapped(weight: Tensor) -> Tensor:
    """The halves of a change's rows exchanged, as a row of a key map with `swap` has them."""
    return torch.cat(weight.chunk(2, dim=0)[::-1], dim=0)


def register() -> None:
    """Let the core's LoRA loaders find our names for models of ours. The core knows those of its own classes only, and
    asks no model; for any other model its answer is unchanged.
    """
    core = comfy.lora.model_lora_keys_unet
    if getattr(core, MARK, False):
        return

    @wraps(core)
    def model_lora_keys_unet(model: Any, key_map: dict[str, Any] | None = None) -> dict[str, Any]:
        keys = core(model, {} if key_map is None else key_map)
        names = getattr(model, "dcgen_lora_names", None)
        for alias, target in names.aliases.items() if names is not None else ():
            keys.setdefault(alias, target)
        return keys

    setattr(model_lora_keys_unet, MARK, True)
    comfy.lora.model_lora_keys_unet = model_lora_keys_unet


@dataclass(frozen=True)
class LoraReport:
    """Weights by core's name: changed, left out because their shape is another here, not in this model at all.

    public: names in LoRA files of the layers that depend on the latent; hint: what to do where nothing was applied.
    """

    applied: tuple[str, ...]
    misfits: tuple[str, ...]
    unknown: tuple[str, ...]
    public: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""

    def __str__(self) -> str:
        whole = len(self.applied) + len(self.misfits) + len(self.unknown)
        if not whole:
            return f"LoRA on a DC-Gen model: nothing in it fits, it was made for another kind of model.{self.hint}"
        text = f"LoRA on a DC-Gen model: {len(self.applied)} of {whole} changes applied."
        if self.misfits:
            text += f" Left out, made for another latent: {', '.join(map(self._named, self.misfits))}."
        if self.unknown:
            more = f" and {len(self.unknown) - LISTED} more" if len(self.unknown) > LISTED else ""
            text += f" Not in this model: {', '.join(map(self._named, self.unknown[:LISTED]))}{more}."
        return text if self.applied else text + self.hint

    def _named(self, name: str) -> str:
        return public_name(name, self.public)


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
    info = getattr(model, "dcgen", None)
    hint = getattr(getattr(model, "diffusion_model", None), "dcgen_lora_hint", "")
    return LoraReport(applied, left, unknown, getattr(info, "latent_layers", None) or {}, hint)


def log(report: LoraReport) -> None:
    """One line, a warning when something was left out."""
    whole = report.applied and not report.misfits and not report.unknown
    logging.log(logging.INFO if whole else logging.WARNING, "%s", report)


def log_merge(misfits: Iterable[str], public: Mapping[str, str]) -> None:
    """A merge comes a weight at a time, and most of them fit: one line for each that does not."""
    for name in misfits:
        logging.warning(
            "Merging into a DC-Gen model: %s is left out, made for another latent.", public_name(name, public)
        )


class Reporting(PatcherMixin):
    """Mixin for the ModelPatcher of a DC-Gen model: LoRA without what was made for another latent, with a report."""

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that a LoRA for another latent cannot change."""
        paths = tuple(f"{NETWORK}{layer}." for layer in self.model.dcgen.latent_layers)
        return {name: tuple(value.shape) for name, value in self.model.named_parameters() if name.startswith(paths)}

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
            log_merge(misfits, self.model.dcgen.latent_layers)
        else:
            log(report(patches, misfits, added, self.model))
        # The core warns once more of each change that is not in the answer.
        return [*added, *(key for key in patches if key not in kept)]


@cache
def _reporting(kind: Any) -> type:
    return type(kind.__name__, (Reporting, kind), {})


def reported(patcher: Any) -> Any:
    """The same patcher, with a LoRA report from now on."""
    if not isinstance(patcher, Reporting):
        # Not another class at construction: the core's dynamic patcher chooses its own class there.
        kind: Any = type(patcher)
        patcher.__class__ = _reporting(kind)
    return patcher


def weight_name(key: Any) -> str:
    """A patch's weight; the core's key may be (weight, slice, function)."""
    return key if isinstance(key, str) else key[0]


def _layer(key: Any) -> str:
    return weight_name(key).rpartition(".")[0]


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(set(map(weight_name, keys))))  # the core's own order changes from run to run


def public_name(name: str, public: Mapping[str, str]) -> str:
    """A layer by the core's name, with the one that LoRA files use where that is another."""
    layer = _layer(name).removeprefix(NETWORK)
    return f"{layer} ({public[layer]})" if public.get(layer, layer) != layer else layer

"""What becomes of each tensor of a model: which layers are quantized, and to which format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor

from ..backbones import Backbone
from ..files import Entry
from ..release import Model
from .formats import Format, Stored

WEIGHT = ".weight"


@dataclass(frozen=True)
class Unit:
    """One tensor by the name in ComfyUI's network, which may join several by diffusers names.

    stored: how it is quantized; None = kept as it is.
    """

    entry: Entry
    parts: tuple[str, ...]
    read: Callable[[], Tensor]
    stored: Stored | None = None

    @property
    def layer(self) -> str:
        return self.entry.name.removesuffix(WEIGHT)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape (out, in) of a Linear's weight, also of one that is stored as a 1x1 convolution."""
        return self.entry.shape[0], self.entry.shape[1]

    @property
    def written(self) -> list[Entry]:
        """The tensors of the file that hold it."""
        return [self.entry] if self.stored is None else self.stored.entries(self.layer, self.matrix)


def network_tensors(model: Model) -> list[Unit]:
    """All tensors of a model as ComfyUI's network has them, not quantized."""
    entries = model.entries
    if not model.backbone.original_network:
        return [Unit(entry, (key,), partial(model.get, key)) for key, entry in entries.items()]
    units = [
        Unit(entry, rule.parts, partial(model.get_original, rule)) for rule, entry in model.original_entries(entries)
    ]
    extras = model.extras.items()
    return units + [Unit(entry, (), partial(model.get_extra, key)) for key, entry in extras]


def plan(model: Model, fmt: Format, keep: Sequence[str] = ()) -> list[Unit]:
    """All tensors of a model, with the layers of its blocks in `fmt`.

    In formats of fewer than 8 bits the first and the last block and the modulation layers are stored in the format's
    `careful` one. keep: patterns (fnmatch) of layers, by either name, that stay as they are. ValueError when a pattern
    fits no layer, or when a layer does not fit the format.
    """
    formats = layer_formats(model.backbone, model.signature, fmt)
    unused = set(keep)
    units, unfit = [], []
    for unit in network_tensors(model):
        layers = [part.removesuffix(WEIGHT) for part in unit.parts]
        stored = _most_exact([formats.get(layer) for layer in layers]) if unit.entry.name.endswith(WEIGHT) else None
        if stored is not None:
            fitting = {pattern for pattern in keep if _fits(pattern, (unit.layer, *layers))}
            unused -= fitting
            stored = None if fitting else stored
        if stored is not None:
            unfit += _problems(unit, stored.format)
        units.append(Unit(unit.entry, unit.parts, unit.read, stored))
    if unused:
        raise ValueError(
            f"--keep {' '.join(sorted(unused))}: {model.tensors.path} has no such layer in its blocks; names are like "
            f"{next((unit.layer for unit in units if unit.stored), 'transformer_blocks.0.*')}"
        )
    if unfit:
        rest = f" and {len(unfit) - 4} more" if len(unfit) > 4 else ""
        raise ValueError(
            f"{model.tensors.path}: {fmt.name} cannot store {'; '.join(unfit[:4])}{rest}. Leave these layers as they "
            "are with --keep, or take another format"
        )
    return units


def layer_formats(backbone: Backbone, base: Mapping[str, Any], fmt: Format) -> dict[str, Stored]:
    """How each Linear in the blocks of a base with this signature is stored, by diffusers path."""
    careful = fmt.careful_format()
    kinds = [kind for kind, (field, _, _) in backbone.stacks.items() if base[field]]
    formats = {}
    for kind, layers in backbone.layers(base).items():
        if kind not in kinds:
            continue
        field, path, _ = backbone.stacks[kind]
        for i in range(base[field]):
            outer = (kind, i) in ((kinds[0], 0), (kinds[-1], base[field] - 1))
            for layer in layers:
                modulation = layer in backbone.modulation.get(kind, ())
                stored = Stored(careful if outer or modulation else fmt, exact=modulation)
                formats[f"{path}.{i}.{layer}"] = stored
    return formats


def _most_exact(stored: Sequence[Stored | None]) -> Stored | None:
    """How layers that are joined are stored: as the one that needs it most."""
    present = [one for one in stored if one is not None]
    if not present or len(present) < len(stored):
        return None
    return max(present, key=lambda one: (one.format.bits, one.exact))


def _fits(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _problems(unit: Unit, fmt: Format) -> list[str]:
    try:
        fmt.check(unit.matrix)
    except ValueError as error:
        return [f"{unit.layer} ({error})"]
    return []


def counted(units: Iterable[Unit]) -> dict[str, int]:
    """Number of layers in each format, by ComfyUI's names of the formats."""
    return dict(Counter(unit.stored.format.core for unit in units if unit.stored))

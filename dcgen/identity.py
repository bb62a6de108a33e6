"""Identifies the base weights that an adapter was trained on by a few of their values.

Models of one architecture have the same shapes, but an adapter only works with the weights it was trained on: with the
published base, for example, and not with the base after another adapter was merged. So an adapter stores some values of
some weights that a LoRA changes. They are compared by distance, not by hash, because the same base is loaded in
bfloat16, fp8 or 4 bits, which rounds every value.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backbones import Backbone
from .fields import check_fields, shown, text

VALUES = 64  # per weight; the distance of two models is then known to a few percent
MAX_WEIGHTS = 64
# Limits of the relative distance, by bits per value. Rounding gives: bfloat16 0.0017, fp8 e4m3 0.026 and e5m2 0.053,
# int8 per row about 0.01, 4-bit formats about 0.1.
ROUNDING = {32: 0.005, 16: 0.005, 8: 0.08, 4: 0.2}


@dataclass(frozen=True)
class BaseIdentity:
    """Values of a base's weights: (VALUES,) float32, by diffusers name."""

    values: Mapping[str, Tensor]

    def distance(self, other: BaseIdentity) -> float | None:
        """|other - this| / |this| over the weights that both have; None when they have none in common."""
        names = [name for name, values in self.values.items() if name in other.values and len(values)]
        if not names:
            return None
        own, others = (torch.cat([identity.values[name] for name in names]) for identity in (self, other))
        return float((others - own).norm() / own.norm().clamp_min(1e-12))

    def is_of(self, other: BaseIdentity, bits: int) -> bool | None:
        """Whether a model with `bits` bits per value is this base; None when that is unknown."""
        distance = self.distance(other)
        return None if distance is None else distance <= ROUNDING[bits]

    def to_dict(self) -> dict[str, str]:
        """For JSON: float16 values in base64, by name."""
        return {
            name: base64.b64encode(values.half().numpy().tobytes()).decode() for name, values in self.values.items()
        }

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> BaseIdentity:
        """Inverse of to_dict; ValueError for anything else."""
        if len(entry) > MAX_WEIGHTS:
            raise ValueError(f"base_weights has {len(entry)} weights, expected at most {MAX_WEIGHTS}")
        check_fields(entry, dict.fromkeys(entry, text(1 << 12)))
        return cls({name: _decoded(name, value) for name, value in entry.items()})


def identity_of(backbone: Backbone, base: Mapping[str, Any], get: Callable[[str], Tensor | None]) -> BaseIdentity:
    """The identity of a base with this signature. get: a weight by diffusers name, or None if it cannot be read.

    A weight with only zeros is left out: nothing was loaded into it or nothing was trained, and it tells no base apart.
    """
    values = {}
    for name in backbone.identity_names(base):
        weight = get(name)
        part = None if weight is None else sampled(name, weight)
        if part is not None and part.any():
            values[name] = part
    return BaseIdentity(values)


def sampled(name: str, weight: Tensor) -> Tensor:
    """(VALUES,) float32 of a weight, at positions seeded by its name."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    positions = torch.randint(weight.numel(), (VALUES,), generator=generator)
    return weight.flatten()[positions.to(weight.device)].float().cpu()


def bits_of(dtype: torch.dtype) -> int:
    """Bits of a stored dtype, as a key of ROUNDING."""
    return min(32, 8 * dtype.itemsize)


def _decoded(name: str, value: str) -> Tensor:
    try:
        values = torch.frombuffer(bytearray(base64.b64decode(value, validate=True)), dtype=torch.float16).float()
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"base_weights[{shown(name)}] is not base64 of float16 values: {error}") from error
    if len(values) != VALUES:
        raise ValueError(f"base_weights[{shown(name)}] has {len(values)} values, expected {VALUES}")
    if not math.isfinite(float(values.sum())):
        raise ValueError(f"base_weights[{shown(name)}] has values that are NaN or infinite")
    return values

# B batch, C latent channels, h w latent rows and columns, f spatial factor
"""Latent spaces as data: which autoencoder, how many channels, how deep, and how its latent is scaled for a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields

from torch import Tensor

from .fields import Check, check_fields, items, optional, real, shown, text, whole
from .jsons import parse_object

METADATA_KEY = "dcgen.latent"
# Wide of everything published (f8c4 to f128c512, scaling 0.13 to 2), narrow enough that nothing computed overflows.
LATENT_FIELDS: dict[str, Check] = {
    "name": text(200),
    "channels": whole(1, 4096),
    "spatial_factor": whole(1, 1024),
    "scaling_factor": real(1e-6, 1e6),
    "shift_factor": real(-1e6, 1e6),
    "rgb_factors": optional(items(items(real(-1e6, 1e6), 3, 3), 1, 4096)),
    "rgb_bias": optional(items(real(-1e6, 1e6), 3, 3)),
}


@dataclass(frozen=True)
class LatentSpace:
    """The latent space of one autoencoder, as a diffusion model sees it.

    name: published name of the autoencoder ("" when unknown); channels: C; spatial_factor: pixels per latent side;
    scaling_factor, shift_factor: model space = (raw - shift) * scaling;
    rgb_factors (C rows of 3) and rgb_bias: linear preview of a model-space latent as RGB in -1..1.
    """

    name: str
    channels: int
    spatial_factor: int
    scaling_factor: float
    shift_factor: float = 0.0
    rgb_factors: tuple[tuple[float, float, float], ...] | None = None
    rgb_bias: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        try:
            check_fields(vars(self), LATENT_FIELDS)
            if self.rgb_factors is not None and len(self.rgb_factors) != self.channels:
                raise ValueError(f"rgb_factors must be {self.channels} rows of 3 numbers, got {len(self.rgb_factors)}")
        except ValueError as error:
            raise ValueError(f"latent space {shown(self.name)}: {error}") from error
        for field in ("scaling_factor", "shift_factor"):
            object.__setattr__(self, field, float(getattr(self, field)))
        if self.rgb_factors is not None:
            object.__setattr__(self, "rgb_factors", tuple(tuple(float(v) for v in row) for row in self.rgb_factors))
        if self.rgb_bias is not None:
            object.__setattr__(self, "rgb_bias", tuple(float(v) for v in self.rgb_bias))

    def normalize(self, latent: Tensor) -> Tensor:
        """Raw autoencoder latent (B,C,h,w) -> model space: (z - shift) * scaling."""
        return (latent - self.shift_factor) * self.scaling_factor

    def denormalize(self, latent: Tensor) -> Tensor:
        """Model-space latent (B,C,h,w) -> raw autoencoder latent: z / scaling + shift."""
        return latent / self.scaling_factor + self.shift_factor

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels -> latent rows and columns; a size that f does not divide is a ValueError."""
        f = self.spatial_factor
        if height < f or width < f or height % f or width % f:
            near = (max(1, round(height / f)) * f, max(1, round(width / f)) * f)
            raise ValueError(
                f"{width}x{height} pixels: {self.name or 'this autoencoder'} needs multiples of {f}. "
                f"Nearest: {near[1]}x{near[0]}."
            )
        return height // f, width // f

    def differences(self, other: LatentSpace) -> list[str]:
        """What keeps a latent of `other` from being a latent of this space, in words; empty when they agree.

        An empty name is unknown and matches any; the names within one line of SHARED are one encoder.
        """
        found = [
            f"{field}: {getattr(self, field)} against {getattr(other, field)}"
            for field in ("channels", "spatial_factor")
            if getattr(self, field) != getattr(other, field)
        ]
        found += [
            f"{field}: {getattr(self, field):.6g} against {getattr(other, field):.6g}"
            for field in ("scaling_factor", "shift_factor")
            if not math.isclose(getattr(self, field), getattr(other, field), rel_tol=1e-4, abs_tol=1e-6)
        ]
        if self.name and other.name and self.name != other.name and not _one_encoder(self.name, other.name):
            found.append(f"autoencoder: {self.name!r} against {other.name!r}")
        return found

    def to_metadata(self) -> dict[str, str]:
        """This space as safetensors metadata: one JSON value under METADATA_KEY."""
        return {METADATA_KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> LatentSpace:
        """Inverse of to_metadata; ValueError when the entry is missing or is not a latent space."""
        if METADATA_KEY not in metadata:
            raise ValueError(f"metadata has no {METADATA_KEY!r} entry, so its latent space is unknown")
        try:
            entry = parse_object(metadata[METADATA_KEY], METADATA_KEY)
            known = {field.name for field in fields(cls)}
            if set(entry) - known:
                raise ValueError(f"unknown fields {shown(sorted(set(entry) - known))}; known are {sorted(known)}")
            check_fields(entry, {}, needed=tuple(field.name for field in fields(cls) if field.default is MISSING))
            return cls(**entry)
        except ValueError as error:
            raise ValueError(f"metadata entry {METADATA_KEY!r} is not a latent space: {error}") from error


# Decoders may differ within a line; the latent is the same.
SHARED: tuple[frozenset[str], ...] = (
    frozenset({"dc-ae-f32c32-sana-1.0", "dc-ae-f32c32-sana-1.1", "dc-ae-lite-f32c32-sana-1.1"}),
)


def _one_encoder(first: str, second: str) -> bool:
    return any(first in names and second in names for names in SHARED)

# B batch, C latent channels, h w latent rows and columns, f spatial factor, ... any grid: (h,w), or (t,h,w) for video
"""Latent spaces as data: autoencoder, channels, spatial factor, and how the latent is scaled for a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields

import torch
from torch import Tensor

from .fields import Check, check_fields, items, optional, real, shown, text, whole
from .jsons import parse_object

METADATA_KEY = "dcgen.latent"
# Wider than anything published (f8c4 to f128c512, scaling 0.13 to 2), but safe from overflow.
LATENT_FIELDS: dict[str, Check] = {
    "name": text(200),
    "channels": whole(1, 4096),
    "spatial_factor": whole(1, 1024),
    "scaling_factor": real(1e-6, 1e6),
    "shift_factor": real(-1e6, 1e6),
    "rgb_factors": optional(items(items(real(-1e6, 1e6), 3, 3), 1, 4096)),
    "rgb_bias": optional(items(real(-1e6, 1e6), 3, 3)),
    "mean": optional(items(real(-1e6, 1e6), 1, 4096)),
    "std": optional(items(real(1e-6, 1e6), 1, 4096)),
    "temporal_factor": whole(1, 1024),
    "packing": whole(1, 64),
}
# Omitted from metadata when they have their default, so that earlier versions read the file.
LATER_FIELDS = ("mean", "std", "temporal_factor", "packing")


@dataclass(frozen=True)
class LatentSpace:
    """The latent space of one autoencoder, as a diffusion model sees it.

    name: published name of the autoencoder ("" when unknown); channels: C; spatial_factor: pixels per latent side;
    scaling_factor, shift_factor, and mean, std of each channel where the autoencoder has them:
    model space = (raw - shift - mean) * scaling / std;
    rgb_factors (C rows of 3) and rgb_bias: linear preview of a model-space latent as RGB in -1..1;
    temporal_factor: frames per latent frame after the first, 1 for images;
    packing: pixels of the autoencoder's own grid along a side of a latent pixel. Where it is above 1 (FLUX.2: 2),
    channels and spatial factor are those of the packed latent, and mean and std are in the autoencoder's weights.
    """

    name: str
    channels: int
    spatial_factor: int
    scaling_factor: float
    shift_factor: float = 0.0
    rgb_factors: tuple[tuple[float, float, float], ...] | None = None
    rgb_bias: tuple[float, float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    temporal_factor: int = 1
    packing: int = 1

    def __post_init__(self) -> None:
        try:
            check_fields(vars(self), LATENT_FIELDS)
            for field in ("rgb_factors", "mean", "std"):
                rows = getattr(self, field)
                if rows is not None and len(rows) != self.channels:
                    raise ValueError(f"{field} has {len(rows)} rows, expected one for each of {self.channels} channels")
        except ValueError as error:
            raise ValueError(f"latent space {shown(self.name)}: {error}") from error
        for field in ("scaling_factor", "shift_factor"):
            object.__setattr__(self, field, float(getattr(self, field)))
        for field in ("rgb_bias", "mean", "std"):
            values = getattr(self, field)
            object.__setattr__(self, field, None if values is None else tuple(float(v) for v in values))
        if self.rgb_factors is not None:
            object.__setattr__(self, "rgb_factors", tuple(tuple(float(v) for v in row) for row in self.rgb_factors))

    def normalize(self, latent: Tensor) -> Tensor:
        """Raw autoencoder latent (B,C,...) -> model space: (z - shift - mean) * scaling / std."""
        latent = latent - self.shift_factor
        if self.mean is not None:
            latent = latent - _per_channel(self.mean, latent)
        latent = latent * self.scaling_factor
        return latent if self.std is None else latent / _per_channel(self.std, latent)

    def denormalize(self, latent: Tensor) -> Tensor:
        """Model-space latent (B,C,...) -> raw autoencoder latent: z * std / scaling + mean + shift."""
        if self.std is not None:
            latent = latent * _per_channel(self.std, latent)
        latent = latent / self.scaling_factor
        if self.mean is not None:
            latent = latent + _per_channel(self.mean, latent)
        return latent + self.shift_factor

    def grid(self, *size: int) -> tuple[int, ...]:
        """Latent grid of an image (height, width), or of a video (frames, height, width); ValueError if none fits."""
        *frames, height, width = size
        if any(count < 1 or (count - 1) % self.temporal_factor for count in frames):
            raise ValueError(f"{frames[0]} frames: {self._title} needs a multiple of {self.temporal_factor}, plus 1")
        return (*((count - 1) // self.temporal_factor + 1 for count in frames), *self.latent_size(height, width))

    @property
    def _title(self) -> str:
        return self.name or "this autoencoder"

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels -> latent rows and columns; a size that f does not divide is a ValueError."""
        f = self.spatial_factor
        if height < f or width < f or height % f or width % f:
            near = (max(1, round(height / f)) * f, max(1, round(width / f)) * f)
            raise ValueError(
                f"{width}x{height} pixels: {self._title} needs multiples of {f}. Nearest: {near[1]}x{near[0]}."
            )
        return height // f, width // f

    def differences(self, other: LatentSpace) -> list[str]:
        """The differences between this space and `other`, in words; empty when their latents are interchangeable.

        An empty name is unknown and matches any; the names in one entry of SHARED have the same encoder. A packed
        space without mean and std does not know them.
        """
        differences = [
            f"{field}: {getattr(self, field)} against {getattr(other, field)}"
            for field in ("channels", "spatial_factor", "temporal_factor", "packing")
            if getattr(self, field) != getattr(other, field)
        ]
        differences += [
            f"{field}: {getattr(self, field):.6g} against {getattr(other, field):.6g}"
            for field in ("scaling_factor", "shift_factor")
            if not math.isclose(getattr(self, field), getattr(other, field), rel_tol=1e-4, abs_tol=1e-6)
        ]
        differences += [f"{field} of the channels" for field in ("mean", "std") if not self._same_rows(other, field)]
        if self.name and other.name and self.name != other.name and not one_encoder(self.name, other.name):
            differences.append(f"autoencoder: {self.name!r} against {other.name!r}")
        return differences

    def _same_rows(self, other: LatentSpace, field: str) -> bool:
        first, second = getattr(self, field), getattr(other, field)
        if first is None or second is None:
            return first is second or self.packing > 1
        if len(first) != len(second):
            return False
        return all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(first, second, strict=True))

    def to_metadata(self) -> dict[str, str]:
        """This space as safetensors metadata: one JSON value under METADATA_KEY."""
        default = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        entry = {key: value for key, value in asdict(self).items() if key not in default.intersection(LATER_FIELDS)}
        return {METADATA_KEY: json.dumps(entry, sort_keys=True)}

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


def _per_channel(values: tuple[float, ...], latent: Tensor) -> Tensor:
    """(C,) -> (C,1,...), to broadcast over a latent (B,C,...)."""
    return torch.tensor(values, dtype=latent.dtype, device=latent.device).view(-1, *[1] * (latent.ndim - 2))


# Autoencoders that share an encoder, and so their latents; their decoders may differ.
SHARED: tuple[frozenset[str], ...] = (
    frozenset({"dc-ae-f32c32-sana-1.0", "dc-ae-f32c32-sana-1.1", "dc-ae-lite-f32c32-sana-1.1"}),
)


def one_encoder(first: str, second: str) -> bool:
    """Whether two published autoencoders have the same encoder, so that their latents are interchangeable."""
    return any(first in names and second in names for names in SHARED)

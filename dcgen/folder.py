"""Reads the configs of a folder in the diffusers layout, for the nodes and for training.

Only JSON files and the headers of weights are read; dcgen.release reads the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .backbones import BACKBONES, Backbone, Config
from .dcae import DCAEConfig, DCAESource
from .fields import Check, check_fields, items, optional, shown, text, whole
from .files import naming, replacing, weight_files
from .jsons import read_object
from .latent import LATENT_FIELDS, METADATA_KEY, LatentSpace, one_encoder
from .schedule import SCHEDULE_KEY, Schedule
from .spaces import SPACES
from .tensors import Tensors

MODEL_INDEX, CONFIG = "model_index.json", "config.json"
TRANSFORMER, VAE = "transformer", "vae"
SCHEDULER = Path("scheduler", "scheduler_config.json")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC")
# Fields in an AutoencoderKL's config.json.
KL_FIELDS: dict[str, Check] = {
    "block_out_channels": items(whole(1, 1 << 16), 1, 10),
    "latent_channels": LATENT_FIELDS["channels"],
    "scaling_factor": LATENT_FIELDS["scaling_factor"],
    "shift_factor": optional(LATENT_FIELDS["shift_factor"]),
}


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder folder: its config.json, the header of its weights (None without weights), its latent space."""

    path: Path
    config: Mapping[str, Any]
    weights: Tensors | None
    latent: LatentSpace

    @property
    def native_pixels(self) -> int | None:
        """The image side in pixels that the release was trained for, if the config names it (1024 for FLUX.1)."""
        size = self.config.get("sample_size")
        return size if isinstance(size, int) else None

    @property
    def is_dcae(self) -> bool:
        """Whether it is a DC-AE rather than an AutoencoderKL."""
        return bool(self.config["_class_name"] == "AutoencoderDC")

    def stored(self) -> Tensors:
        """Its weights; FileNotFoundError when the folder has only a config.json."""
        if self.weights is None:
            raise FileNotFoundError(f"{self.path} has a config.json but no weights (.safetensors): download them too")
        return self.weights

    def dcae_source(self) -> DCAESource:
        """For load_dcae: what is read already is not read again."""
        weights = self.stored()
        return DCAESource(
            self.path, str(self.path), self.path.name, weights.entries, weights.get, weights.metadata, self.config
        )


@dataclass(frozen=True)
class Release:
    """A release folder in the diffusers layout. Each of its files is read once, when it is first needed.

    FileNotFoundError or ValueError name a missing or damaged file.
    """

    path: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json: part -> [library, class]."""
        return read_object(self.path / MODEL_INDEX)

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """config.json of the network; empty when there is none."""
        file = self.path / TRANSFORMER / CONFIG
        return read_object(file) if file.is_file() else {}

    @cached_property
    def weights(self) -> Tensors:
        """The header of the network's weights."""
        return Tensors.open(part(self.path, TRANSFORMER))

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The autoencoder; None when there is no vae/config.json."""
        return open_autoencoder(self.path / VAE) if (self.path / VAE / CONFIG).is_file() else None

    @cached_property
    def stored_schedule(self) -> Schedule | None:
        """The schedule in scheduler_config.json; None when it leaves the shift to the model."""
        return stored_schedule(self.path)

    @cached_property
    def _network(self) -> tuple[Backbone, Config]:
        return known_network(self.network_config, part(self.path, TRANSFORMER) / CONFIG)

    @property
    def backbone(self) -> Backbone:
        """The family of the network, by the class in its config.json."""
        return self._network[0]

    @property
    def config(self) -> Config:
        """The network's config, checked."""
        return self._network[1]

    @property
    def latent(self) -> LatentSpace:
        """The latent space of the autoencoder, which must be there."""
        return (self.autoencoder or open_autoencoder(part(self.path, VAE))).latent

    @property
    def schedule(self) -> Schedule:
        """The schedule that the release states, else the one of the published models on its latent."""
        return self.stored_schedule or self.backbone.default_schedule(self.latent, self.config)

    @property
    def patch_size(self) -> int:
        """Patch size p of the network on its latent."""
        return self.backbone.patch_size(self.config, self.latent, str(self.path / TRANSFORMER))

    @property
    def distilled(self) -> bool:
        """Whether the network has a guidance embedding."""
        return bool(self.config.get("guidance_embeds"))

    @property
    def signature(self) -> dict[str, Any]:
        """Backbone.base_signature of the config."""
        return self.backbone.base_signature(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the network's stored values."""
        return self.weights.dtype


def read_release(path: str | os.PathLike[str]) -> Release:
    """A release folder whose configs are all read and checked; no weights need to be there."""
    release = Release(Path(path))
    _ = release.config, release.latent, release.schedule
    return release


def part(release: str | os.PathLike[str], name: str) -> Path:
    """Folder of one part of a release; FileNotFoundError names a missing one."""
    folder = Path(release) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found; {release} should be a release folder in the diffusers layout")
    return folder


def network_config(folder: Path) -> tuple[Backbone, Config]:
    """Family and checked config of a transformer folder, from its config.json."""
    file = folder / CONFIG
    return known_network(read_object(file) if file.is_file() else {}, file)


def known_network(config: dict[str, Any], file: Path) -> tuple[Backbone, Config]:
    """Family and checked config of a network by what its config.json says; errors name that file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; a release's network is config.json + safetensors")
    class_name = config.get("_class_name")
    for backbone in BACKBONES.values():
        if backbone.diffusers_class == class_name:
            with naming(file):
                check_fields(config, backbone.fields)
            return backbone, {key: value for key, value in config.items() if not key.startswith("_")}
    known = ", ".join(backbone.diffusers_class for backbone in BACKBONES.values())
    raise ValueError(f"{file}: class {shown(class_name)} is not a known backbone; known: {known}")


def open_autoencoder(folder: str | os.PathLike[str]) -> Autoencoder:
    """Open an autoencoder folder; errors name a missing file, an unknown class or a wrong number in the config.

    The preview factors of the latent space are from the metadata of the weights.
    """
    folder = Path(folder)
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; an autoencoder is a diffusers folder (config.json + safetensors)")
    config = read_object(file)
    with naming(file):
        if config.get("_class_name") not in AUTOENCODERS:
            raise ValueError(f"class {shown(config.get('_class_name'))}; expected {' or '.join(AUTOENCODERS)}")
        check_fields(config, {"_name_or_path": optional(text(4096))})
        latent = space_of_config(config, folder.resolve().name)
    weights = Tensors.open(folder) if weight_files(folder) else None
    return Autoencoder(folder, config, weights, _with_preview(latent, weights.metadata if weights else {}))


def autoencoder_config(folder: str | os.PathLike[str]) -> Mapping[str, Any]:
    """config.json of an autoencoder folder, checked as by open_autoencoder."""
    return open_autoencoder(folder).config


def autoencoder_space(folder: str | os.PathLike[str]) -> LatentSpace:
    """Latent space of an autoencoder folder."""
    return open_autoencoder(folder).latent


def space_of_config(config: Mapping[str, Any], folder: str = "") -> LatentSpace:
    """Latent space of an autoencoder's config: always with the config's own numbers, not those in our tables.

    The name is the one in the config or the folder's, or a published name if the numbers fit only that one.
    """
    if config.get("_class_name") == "AutoencoderKL":
        check_fields(config, KL_FIELDS, ("block_out_channels", "latent_channels", "scaling_factor"))
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        numbers = (config["latent_channels"], factor, config["scaling_factor"], config.get("shift_factor") or 0.0)
    else:
        dcae = DCAEConfig.from_diffusers(config)
        if dcae.scaling_factor is None:
            raise ValueError("scaling_factor is missing")
        numbers = (dcae.latent_channels, dcae.spatial_factor, dcae.scaling_factor, 0.0)
    name = Path(config.get("_name_or_path") or folder).name.removesuffix("-diffusers")
    return _published(LatentSpace("" if name == VAE else name, *numbers))


def _published(space: LatentSpace) -> LatentSpace:
    """The space with the published name that its numbers fit, unless it has one already or several encoders fit."""
    if space.name in SPACES:
        return space
    candidates = [name for name, known in SPACES.items() if not known.differences(replace(space, name=""))]
    unique = bool(candidates) and all(name == candidates[0] or one_encoder(name, candidates[0]) for name in candidates)
    return replace(space, name=candidates[0]) if unique else space


def _with_preview(space: LatentSpace, metadata: Mapping[str, str]) -> LatentSpace:
    stored = LatentSpace.from_metadata(metadata) if METADATA_KEY in metadata else None
    if stored is None or stored.channels != space.channels:
        return space
    return replace(space, rgb_factors=stored.rgb_factors, rgb_bias=stored.rgb_bias)


def stored_schedule(release: Path) -> Schedule | None:
    """The schedule in a release's scheduler_config.json; None when it leaves the shift to the model."""
    file = release / SCHEDULER
    config = read_object(file) if file.is_file() else {}
    with naming(file):
        return Schedule.from_scheduler_config(config)


def note_schedule(release: Path, schedule: Schedule | None) -> None:
    """Write `schedule` into a release's scheduler_config.json, if it has one."""
    file = release / SCHEDULER
    if schedule is None or not file.is_file():
        return
    config = {**read_object(file), SCHEDULE_KEY: schedule.to_dict()}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

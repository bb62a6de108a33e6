"""Models on disk: a diffusers release folder, its transformer folder, or a single file in either naming."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .backbones import Backbone, Config, detect_backbone
from .backbones.keymap import Rule
from .fields import shown
from .files import Entry, check_finite, naming
from .folder import CONFIG, TRANSFORMER, VAE, Release
from .identity import BaseIdentity, identity_of
from .jsons import parse_object, read_object
from .kinds import ALL_IN_ONE, is_quantised, what_it_may_be
from .latent import METADATA_KEY, LatentSpace
from .schedule import Schedule
from .tensors import Tensors

CONFIG_KEY, SCHEDULE_KEY, BACKBONE_KEY, PATCH_KEY = (
    "dcgen.config",
    "dcgen.schedule",
    "dcgen.backbone",
    "dcgen.patch_size",
)


def same_shape(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> bool:
    """Whether a weight has the expected shape; a 1x1 convolution may be stored as a matrix.

    ComfyUI's Model Save does so for SANA, where our network has Linear layers.
    """
    return shape == expected or (expected is not None and len(expected) == 4 and (*shape, 1, 1) == expected)


@dataclass
class Model:
    """A denoising network on disk in any layout, by its diffusers names; tensors are read on demand.

    latent is None when neither the file nor the folder names the autoencoder; native_pixels: the image side that the
    release was trained for, if its autoencoder's config names it.
    """

    tensors: Tensors
    backbone: Backbone
    config: Config
    latent: LatentSpace | None
    schedule: Schedule | None
    native_pixels: int | None = None

    @property
    def patch_size(self) -> int:
        """Patch size p on the latent; ValueError when the latent is unknown or fits no patch size."""
        if self.latent is None:
            raise ValueError(f"{self.tensors.path} does not say which autoencoder its latents come from")
        return self.backbone.patch_size(self.config, self.latent, str(self.tensors.path))

    @property
    def signature(self) -> dict[str, Any]:
        """Backbone.base_signature of the config."""
        return self.backbone.base_signature(self.config)

    def identity(self) -> BaseIdentity:
        """A few values of the weights, which identify the model among those of its architecture."""
        return identity_of(self.backbone, self.signature, self.get)

    def on_latent(self, latent: LatentSpace) -> Model:
        """The same model on this latent, for a file that does not name one, with the published schedule for it."""
        return replace(
            self, latent=latent, schedule=self.schedule or self.backbone.default_schedule(latent, self.config)
        )

    @cached_property
    def _bare(self) -> dict[str, Entry]:
        """The entries of the file, by name without prefix."""
        return dict(self.backbone.bare_keys(self.tensors.entries))

    @cached_property
    def _prefix(self) -> str:
        """The prefix of every key in the file."""
        bare = next(iter(self._bare))
        return self._bare[bare].name[: -len(bare)]

    @cached_property
    def _sources(self) -> dict[str, tuple[Entry, Rule | None, int, int | None]]:
        """Diffusers name -> (entry under that name, key map rule or None, rows in the file's tensor)."""
        bare = self._bare
        if is_quantised(bare):
            raise ValueError(f"{self.tensors.path}: {what_it_may_be(bare, '')}")
        depths, width = self.backbone.depths(self.config), self.backbone.width(self.config)
        if not self.backbone.is_original(bare):
            self.backbone.key_map(self.config).original_plan(bare, depths)  # raises when it is not a complete model
            return {key: (replace(entry, name=key), None, 0, None) for key, entry in bare.items()}
        sources: dict[str, tuple[Entry, Rule | None, int, int | None]] = {}
        for rule in self.backbone.key_map(self.config).diffusers_plan(bare, depths):
            joined = bare[rule.original_key(bare)]
            for key, start, stop in rule.rows(joined.shape[0], width):
                sources[key] = (Entry(key, joined.dtype, (stop - start, *joined.shape[1:])), rule, start, stop)
        return sources

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by diffusers name; ValueError lists keys that are missing or unknown."""
        return {key: entry for key, (entry, *_) in self._sources.items()}

    def get(self, key: str) -> Tensor:
        """One tensor by diffusers name, read from disk."""
        _, rule, start, stop = self._sources[key]
        if rule is None:
            return self._read(key)
        name = rule.original_key(self._bare)
        if len(rule.parts) > 1:  # never swapped: only these rows are read
            return self._read(name, start, stop)
        return next(iter(rule.split(self._read(name), self.backbone.width(self.config))))[1]

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor of the file by its name without prefix; ValueError when a value is not finite."""
        return check_finite(self.tensors.get(self._prefix + name, start, stop), name, self.tensors.path)

    def check(self) -> None:
        """ValueError that names the file unless config and tensors are those of one complete model.

        For a quantised file only the config is checked: its tensors are packed.
        """
        with naming(self.tensors.path):
            self.backbone.check_config(self.config)
            if is_quantised(self._bare):
                return
            entries, shapes = self.entries, self.backbone.shapes(self.config)
            mismatches = [
                f"{key} is {entry.dtype} {entry.shape}, expected floating point {shapes.get(key, 'of no shape')}"
                for key, entry in entries.items()
                if not same_shape(entry.shape, shapes.get(key)) or not entry.dtype.is_floating_point
            ]
            mismatches += [f"{key} is absent" for key in self.backbone.other_shapes(self.config) if key not in entries]
            if mismatches:
                rest = f" and {len(mismatches) - 4} more" if len(mismatches) > 4 else ""
                problem = f"config and tensors are not of one {self.backbone.name}"
                raise ValueError(f"{problem}: {'; '.join(mismatches[:4])}{rest}")

    def check_values(self) -> None:
        """ValueError that names file and tensor when a value is NaN or infinite; reads every tensor once."""
        for key in self.entries:
            self.get(key)

    @property
    def extras(self) -> dict[str, Entry]:
        """Tensors of an original file without a diffusers name that are kept, by original name."""
        return {key: replace(self._bare[key], name=key) for key in self.backbone.extras if key in self._bare}

    def get_extra(self, key: str) -> Tensor:
        """A tensor of `extras`, read from disk."""
        return self._read(key)

    def original_entries(self, entries: Mapping[str, Entry]) -> Iterator[tuple[Rule, Entry]]:
        """(rule, resulting entry) for every original tensor that can be joined from `entries`."""
        for rule in self.backbone.key_map(self.config).original_plan(entries, self.backbone.depths(self.config)):
            parts = [entries[key] for key in rule.parts]
            if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
                raise ValueError(f"{self.tensors.path}: {rule.original} would join tensors of different types: {parts}")
            rows = parts[0].shape[0] if rule.copied else sum(part.shape[0] for part in parts)
            yield rule, Entry(rule.original, parts[0].dtype, (rows, *parts[0].shape[1:]))

    def get_original(self, rule: Rule) -> Tensor:
        """The tensor of a rule from original_entries: read as it is from a file with original names, else joined."""
        if self.backbone.is_original(self._bare):
            return self._read(rule.original_key(self._bare))
        return rule.join(self.get)

    native_entries = original_entries  # its former name, which scripts elsewhere call


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a release folder, a transformer folder, a .safetensors or a .pth; errors name the file and the remedy."""
    path = Path(path)
    if (path / TRANSFORMER).is_dir():
        return model_of_release(Release(path))
    tensors = Tensors.open(path)
    if not path.is_dir():
        return model_of(tensors)
    config = read_object(path / CONFIG) if (path / CONFIG).is_file() else {}
    return model_of(tensors, config, Release(path if (path / VAE).is_dir() else path.parent))


def model_of_release(release: Release) -> Model:
    """The network of a release folder."""
    return model_of(release.weights, release.network_config, release)


def model_of(tensors: Tensors, config_json: Mapping[str, Any] | None = None, release: Release | None = None) -> Model:
    """The network that these tensors are, checked. config_json: the config.json beside them, if there is one.

    release: the folder they are in, for what their own metadata leaves open: latent space, schedule, native size.
    """
    network = [key for key in tensors.entries if key.startswith(ALL_IN_ONE)]
    if network and len(network) < len(tensors.entries):
        tensors = tensors.under(ALL_IN_ONE)
    with naming(tensors.path):
        backbone, config = detect_backbone(tensors.meta())
        names = backbone.bare_keys({key: key for key in tensors.entries})
        config |= backbone.read_values(names, lambda key: tensors.get(names[key]))
        config |= _stored_config(tensors.metadata, config_json or {}, backbone)
        latent, schedule = _own_latent(tensors.metadata), _own_schedule(tensors.metadata)
    autoencoder = release.autoencoder if release else None
    if release and autoencoder:
        latent = latent or autoencoder.latent
    if release:
        schedule = schedule or release.stored_schedule
    model = Model(tensors, backbone, config, latent, schedule, autoencoder.native_pixels if autoencoder else None)
    model.check()
    return model if latent is None else model.on_latent(latent)


def model_metadata(model: Model, title: str) -> dict[str, str]:
    """Safetensors metadata with the information of a release folder, for a single file."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": model.backbone.modelspec,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        **{key: value for key, value in model.tensors.metadata.items() if key != "format"},
        BACKBONE_KEY: model.backbone.name,
        CONFIG_KEY: json.dumps(model.config, sort_keys=True),
    }
    if model.schedule is not None:
        metadata[SCHEDULE_KEY] = json.dumps(model.schedule.to_dict(), sort_keys=True)
    if model.latent is not None:
        metadata[PATCH_KEY] = str(model.patch_size)
        metadata |= model.latent.to_metadata()
    return metadata


def _own_latent(metadata: Mapping[str, str]) -> LatentSpace | None:
    return LatentSpace.from_metadata(metadata) if METADATA_KEY in metadata else None


def _own_schedule(metadata: Mapping[str, str]) -> Schedule | None:
    if SCHEDULE_KEY not in metadata:
        return None
    return Schedule.parse(parse_object(metadata[SCHEDULE_KEY], SCHEDULE_KEY))


def _stored_config(metadata: Mapping[str, str], config_json: Mapping[str, Any], backbone: Backbone) -> Config:
    if CONFIG_KEY in metadata:
        return parse_object(metadata[CONFIG_KEY], CONFIG_KEY)
    class_name = config_json.get("_class_name", backbone.diffusers_class)
    if class_name != backbone.diffusers_class:
        raise ValueError(
            f"config.json says {shown(class_name)}, the tensors are a {backbone.diffusers_class}: not from one model"
        )
    return {key: value for key, value in config_json.items() if not key.startswith("_") and value is not None}

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
from .backbones.base import patch_size
from .backbones.keymap import Rule
from .dcae import DCAEConfig
from .fields import Check, check_fields, flag, items, optional, shown, whole
from .files import Entry, check_finite, naming, replacing, weight_files
from .jsons import parse_object, read_object
from .kinds import ALL_IN_ONE, is_quantised, what_it_may_be
from .latent import LATENT_FIELDS, METADATA_KEY, LatentSpace
from .schedule import check_schedule
from .spaces import SPACES
from .tensors import Tensors

TRANSFORMER = "transformer"
CONFIG_KEY, SCHEDULE_KEY, BACKBONE_KEY, PATCH_KEY = (
    "dcgen.config",
    "dcgen.schedule",
    "dcgen.backbone",
    "dcgen.patch_size",
)
# In scheduler_config.json, which has no field for FLUX.2's rule. diffusers skips what begins with an underscore.
SCHEDULE_FIELD = "_dcgen_schedule"
# Of an AutoencoderKL's config.json.
KL_FIELDS: dict[str, Check] = {
    "block_out_channels": items(whole(1, 1 << 16), 1, 10),
    "latent_channels": LATENT_FIELDS["channels"],
    "scaling_factor": LATENT_FIELDS["scaling_factor"],
    "shift_factor": optional(LATENT_FIELDS["shift_factor"]),
}


def same_shape(found: tuple[int, ...], wanted: tuple[int, ...] | None) -> bool:
    """Whether a weight has the shape of its table; a 1x1 convolution may be stored as the matrix it is.

    ComfyUI's Model Save writes those of SANA so: our network has Linear layers for them.
    """
    return found == wanted or (wanted is not None and len(wanted) == 4 and (*found, 1, 1) == wanted)


@dataclass
class Model:
    """A denoising network on disk, whatever its layout, seen under its diffusers names; nothing is read until asked.

    latent is None when nothing at hand says which autoencoder it belongs to.
    """

    tensors: Tensors
    backbone: Backbone
    config: Config
    latent: LatentSpace | None
    schedule: dict[str, Any] | None

    @cached_property
    def _bare(self) -> dict[str, Entry]:
        """What the file holds, by its names without prefix."""
        return dict(self.backbone.bare_keys(self.tensors.entries))

    @cached_property
    def _prefix(self) -> str:
        """What stands before every key in the file."""
        bare = next(iter(self._bare))
        return self._bare[bare].name[: -len(bare)]

    @cached_property
    def _sources(self) -> dict[str, tuple[Entry, Rule | None, int, int | None]]:
        """Diffusers name -> (entry under that name, rule to undo, rows in the file's tensor)."""
        bare = self._bare
        if is_quantised(bare):
            raise ValueError(f"{self.tensors.path}: {what_it_may_be(bare, '')}")
        depths, width = self.backbone.depths(self.config), self.backbone.width(self.config)
        if not self.backbone.is_native(bare):
            self.backbone.key_map(self.config).native_plan(bare, depths)  # refuses what is not a whole model
            return {key: (replace(entry, name=key), None, 0, None) for key, entry in bare.items()}
        found: dict[str, tuple[Entry, Rule | None, int, int | None]] = {}
        for rule in self.backbone.key_map(self.config).diffusers_plan(bare, depths):
            whole = bare[rule.native_key(bare)]
            for key, start, stop in rule.rows(whole.shape[0], width):
                found[key] = (Entry(key, whole.dtype, (stop - start, *whole.shape[1:])), rule, start, stop)
        return found

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors by diffusers name; ValueError lists keys that are missing or unknown."""
        return {key: entry for key, (entry, *_) in self._sources.items()}

    def get(self, key: str) -> Tensor:
        """One tensor by diffusers name, read now."""
        _, rule, start, stop = self._sources[key]
        if rule is None:
            return self._read(key)
        name = rule.native_key(self._bare)
        if len(rule.parts) > 1:  # never swapped: the rows can be read alone
            return self._read(name, start, stop)
        return next(iter(rule.split(self._read(name), self.backbone.width(self.config))))[1]

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor of the file by its name without prefix; ValueError when a value is not finite."""
        return check_finite(self.tensors.get(self._prefix + name, start, stop), name, self.tensors.path)

    def check(self) -> None:
        """ValueError that names the file unless config and tensors are those of one whole model.

        Of a quantised file only the config can be checked: its tensors are not the model's.
        """
        with naming(self.tensors.path):
            self.backbone.check_config(self.config)
            if is_quantised(self._bare):
                return
            entries, wanted = self.entries, self.backbone.shapes(self.config)
            bent = [
                f"{key} is {entry.dtype} {entry.shape}, expected floating point {wanted.get(key, 'of no shape')}"
                for key, entry in entries.items()
                if not same_shape(entry.shape, wanted.get(key)) or not entry.dtype.is_floating_point
            ]
            bent += [f"{key} is absent" for key in self.backbone.other_shapes(self.config) if key not in entries]
            if bent:
                more = f" and {len(bent) - 4} more" if len(bent) > 4 else ""
                raise ValueError(f"config and tensors are not of one {self.backbone.name}: {'; '.join(bent[:4])}{more}")

    @property
    def extras(self) -> dict[str, Entry]:
        """What an original file holds beyond what diffusers names and is worth keeping, by original name."""
        return {key: replace(self._bare[key], name=key) for key in self.backbone.extras if key in self._bare}

    def get_extra(self, key: str) -> Tensor:
        """A tensor of `extras`, read now."""
        return self._read(key)

    def native_entries(self, entries: Mapping[str, Entry]) -> Iterator[tuple[Rule, Entry]]:
        """(rule, what it makes out of `entries`) for every tensor under its original name."""
        for rule in self.backbone.key_map(self.config).native_plan(entries, self.backbone.depths(self.config)):
            parts = [entries[key] for key in rule.parts]
            if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
                raise ValueError(f"{self.tensors.path}: {rule.native} would join tensors of different types: {parts}")
            rows = parts[0].shape[0] if rule.copied else sum(part.shape[0] for part in parts)
            yield rule, Entry(rule.native, parts[0].dtype, (rows, *parts[0].shape[1:]))


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a release folder, a transformer folder, a .safetensors or a .pth; errors name the file and what to do."""
    path = Path(path)
    weights = path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path
    tensors = Tensors.open(weights)
    inside = [key for key in tensors.entries if key.startswith(ALL_IN_ONE)]
    if inside and len(inside) < len(tensors.entries):
        tensors = tensors.under(ALL_IN_ONE)
    with naming(weights):
        backbone, config = detect_backbone(tensors.meta())
        names = backbone.bare_keys({key: key for key in tensors.entries})
        config |= backbone.read_values(names, lambda key: tensors.get(names[key]))
        config |= _stored_config(tensors, weights, backbone)
        latent, schedule = _latent(tensors.metadata, path), _schedule(tensors.metadata, path)
        model = Model(tensors, backbone, config, latent, schedule)
        model.check()
        if latent is not None and schedule is None:
            model.schedule = backbone.default_schedule(latent, config)
    return model


def model_metadata(model: Model, title: str) -> dict[str, str]:
    """Safetensors metadata that lets a single file say what a release folder says."""
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
        metadata[SCHEDULE_KEY] = json.dumps(model.schedule, sort_keys=True)
    if model.latent is not None:
        packed = model.backbone.packed_channels(model.config)
        metadata[PATCH_KEY] = str(patch_size(packed, model.latent.channels, str(model.tensors.path)))
        metadata |= model.latent.to_metadata()
    return metadata


def note_schedule(release: Path, schedule: Mapping[str, Any] | None) -> None:
    """Write `schedule` (dcgen.schedule) into a release's scheduler_config.json, if it has one."""
    file = release / "scheduler" / "scheduler_config.json"
    if schedule is None or not file.is_file():
        return
    config = {**read_object(file), SCHEDULE_FIELD: dict(schedule)}
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stored_schedule(release: Path) -> dict[str, Any] | None:
    """The schedule that a release's scheduler_config.json says outright, None when it leaves it to the model."""
    file = release / "scheduler" / "scheduler_config.json"
    config = read_object(file) if file.is_file() else {}
    with naming(file):
        if SCHEDULE_FIELD in config:
            check_schedule(config[SCHEDULE_FIELD])
            return config[SCHEDULE_FIELD]
        check_fields(config, {"use_flow_sigmas": optional(flag)})
        if not config.get("use_flow_sigmas"):
            return None
        if "flow_shift" not in config:
            raise ValueError("flow_shift is missing, though use_flow_sigmas is true")
        schedule = {"rule": "static", "shift": config["flow_shift"]}
        check_schedule(schedule)
        return {**schedule, "shift": float(schedule["shift"])}


def kl_space(config: Mapping[str, Any]) -> LatentSpace:
    """Latent space, without a name, of a diffusers AutoencoderKL config."""
    check_fields(config, KL_FIELDS, ("block_out_channels", "latent_channels", "scaling_factor"))
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    shift = config.get("shift_factor") or 0.0
    return LatentSpace("", config["latent_channels"], factor, config["scaling_factor"], shift)


def latent_of_vae(config: Mapping[str, Any]) -> LatentSpace:
    """Latent space of a diffusers vae/config.json: the config's numbers, under the published name that has them."""
    if config.get("_class_name") == "AutoencoderKL":
        space = kl_space(config)
    else:
        dcae = DCAEConfig.from_diffusers(config)
        if dcae.scaling_factor is None:
            raise ValueError("vae/config.json has no scaling_factor")
        name = dcae.name.rstrip("/").rsplit("/", 1)[-1].removesuffix("-diffusers")
        space = LatentSpace(name, dcae.latent_channels, dcae.spatial_factor, dcae.scaling_factor)
    if space.name in SPACES:
        return space
    fits = [name for name, known in SPACES.items() if not known.differences(replace(space, name=""))]
    return replace(space, name=fits[0]) if fits else space


def _latent(metadata: Mapping[str, str], path: Path) -> LatentSpace | None:
    if METADATA_KEY in metadata:
        return LatentSpace.from_metadata(metadata)
    for part in (path / "vae", path.parent / "vae"):
        config = part / "config.json"
        if path.is_dir() and config.is_file():
            values = read_object(config)
            with naming(config):
                space = latent_of_vae(values)
            return _with_preview(space, part)
    return None


def _with_preview(space: LatentSpace, folder: Path) -> LatentSpace:
    """The space with the preview factors that the autoencoder's own file may carry."""
    metadata = Tensors.open(folder).metadata if weight_files(folder) else {}
    stored = LatentSpace.from_metadata(metadata) if METADATA_KEY in metadata else None
    if stored is None or stored.channels != space.channels:
        return space
    return replace(space, rgb_factors=stored.rgb_factors, rgb_bias=stored.rgb_bias)


def _stored_config(tensors: Tensors, folder: Path, backbone: Backbone) -> Config:
    if CONFIG_KEY in tensors.metadata:
        return parse_object(tensors.metadata[CONFIG_KEY], CONFIG_KEY)
    file = folder / "config.json"
    if not folder.is_dir() or not file.is_file():
        return {}
    config = read_object(file)
    found = config.get("_class_name", backbone.diffusers_class)
    if found != backbone.diffusers_class:
        raise ValueError(
            f"config.json says {shown(found)}, the tensors are a {backbone.diffusers_class}: not from one model"
        )
    return {key: value for key, value in config.items() if not key.startswith("_") and value is not None}


def _schedule(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    if SCHEDULE_KEY not in metadata:
        return stored_schedule(path)
    schedule = parse_object(metadata[SCHEDULE_KEY], SCHEDULE_KEY)
    check_schedule(schedule)
    return schedule

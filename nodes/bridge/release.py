"""Release folders in the diffusers layout (model_index.json and one sub-folder a part), found and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import folder_paths
from torch import Tensor

from ...dcgen.backbones.base import patch_size
from ...dcgen.dcae.config import DCAEConfig
from ...dcgen.latent import SPACES, LatentSpace
from .flux import FLUX, by_module, load_flux
from .kl_vae import load_kl_vae
from .latent_format import ModelInfo
from .text import load_flux_text
from .weights import Weights

INDEX = "model_index.json"
_DEPTH = 3


@dataclass(frozen=True)
class Release:
    """One release folder: its path and its model_index.json."""

    path: Path
    index: dict[str, Any]

    def config(self, part: str) -> dict[str, Any]:
        """config.json of a part; ValueError when the part is not there."""
        file = self.path / part / "config.json"
        if not file.is_file():
            raise ValueError(f"{self.path} has no {part}/config.json, so it is not a whole release. Download it again.")
        return json.loads(file.read_text(encoding="utf-8"))


def release_names() -> list[str]:
    """Release folders below models/diffusers and its extra paths, as paths relative to their root."""
    names: dict[str, None] = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        names.update({folder.relative_to(root).as_posix(): None for folder in _with_index(root)})
    return list(names)


def _with_index(root: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        children[:] = [] if depth >= _DEPTH or INDEX in files else sorted(c for c in children if not c.startswith("."))
        if INDEX in files and depth:
            yield Path(folder)


def open_release(name: str) -> Release:
    """The release of that name; ValueError says where it was looked for."""
    roots = folder_paths.get_folder_paths("diffusers")
    for root in roots:
        folder = Path(root) / name
        if (folder / INDEX).is_file():
            return Release(folder, json.loads((folder / INDEX).read_text(encoding="utf-8")))
    raise ValueError(f"no release {name!r} (a folder with {INDEX}) in {', '.join(roots)}. Put it in models/diffusers.")


def load_release(name: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a FLUX or DC-Gen FLUX release folder."""
    release = open_release(name)
    kind = release.index.get("transformer", [None, None])[1]
    if kind != FLUX.diffusers_class:
        raise ValueError(f"{release.path}: its transformer is a {kind}; this node loads {FLUX.diffusers_class} (FLUX).")
    return load_model(release), load_flux_text(release.path, release.index), load_vae(release)


def load_vae(release: Release) -> comfy.sd.VAE:
    """VAE of a release: core's own class for an f8 AutoencoderKL, ours for a DC-AE."""
    config = release.config("vae")
    if config.get("_class_name") == "AutoencoderKL":
        return load_kl_vae(release.path / "vae", config)
    from .vae import make_vae

    return make_vae(release.path / "vae")


def load_model(release: Release, options: dict[str, Any] | None = None) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a release folder's transformer/, read a block at a time."""
    config = release.config("transformer")
    space = space_of(release.config("vae"))
    size = patch_size(config["in_channels"], space.channels, f"the transformer of {release.path}")
    info = ModelInfo(space, size, schedule_of(space))
    weights = Weights.of_folder(release.path / "transformer")
    return load_diffusers_flux(weights, config, info, options)


def load_diffusers_flux(
    weights: Weights, config: dict[str, Any], info: ModelInfo, options: dict[str, Any] | None = None
) -> comfy.model_patcher.ModelPatcher:
    """MODEL from FLUX weights with diffusers names."""
    plan = FLUX.keys.native_plan(weights.shapes, FLUX.depths(config))
    shapes = {rule.native: rule.join(weights.shapes.__getitem__) for rule in plan}

    def parts() -> Iterable[dict[str, Tensor]]:
        for rules in by_module(plan, lambda rule: rule.native):
            tensors = weights.read(key for rule in rules for key in rule.parts)
            yield {rule.native: rule.join(tensors.__getitem__) for rule in rules}

    return load_flux(parts, config, info, shapes, options)


def space_of(config: Mapping[str, Any]) -> LatentSpace:
    """Latent space of a vae/config.json. The numbers are the config's; the name is the published one if it fits."""
    if config.get("_class_name") == "AutoencoderKL":
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        shift = config.get("shift_factor") or 0.0
        space = LatentSpace("", config["latent_channels"], factor, config["scaling_factor"], shift)
        fits = [known for known in SPACES.values() if not known.differences(space)]
        return fits[0] if fits else space
    dcae = DCAEConfig.from_diffusers(config)
    if dcae.scaling_factor is None:
        raise ValueError(f"vae/config.json of {dcae.name or 'this DC-AE'} has no scaling_factor")
    name = dcae.name.rstrip("/").rsplit("/", 1)[-1].removesuffix("-diffusers")
    return LatentSpace(name, dcae.latent_channels, dcae.spatial_factor, dcae.scaling_factor)


def schedule_of(space: LatentSpace) -> dict[str, Any]:
    """The shift a release is sampled with: DC-Gen's f32 models FLUX.2's rule, all others FLUX.1's."""
    return {"rule": "flux2" if space.spatial_factor == 32 else "flux"}

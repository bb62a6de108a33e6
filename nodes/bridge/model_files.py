"""Merged DC-Gen FLUX models by name: release folders in models/diffusers, files in models/diffusion_models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.model_patcher
import folder_paths
import torch
from torch import Tensor

from ...dcgen.backbones.base import patch_size
from ...dcgen.latent import METADATA_KEY, SPACES, LatentSpace
from .flux import FLUX, by_module, load_flux
from .latent_format import ModelInfo
from .release import load_diffusers_flux, load_model, open_release, release_names, schedule_of
from .weights import Weights

FROM_FILE = "from the file"
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def names() -> list[str]:
    """Everything DCGenModelLoader offers."""
    return [*release_names(), *folder_paths.get_filename_list("diffusion_models")]


def autoencoder_names() -> list[str]:
    """Latent spaces a user may name for a file that does not say its own."""
    return [FROM_FILE, *SPACES]


def load(name: str, weight_dtype: str, autoencoder: str) -> comfy.model_patcher.ModelPatcher:
    """MODEL of that name."""
    options = WEIGHT_DTYPES[weight_dtype]
    if name in release_names():
        return load_model(open_release(name), options)
    path = Path(folder_paths.get_full_path_or_raise("diffusion_models", name))
    if path.suffix not in (".safetensors", ".sft"):
        raise ValueError(f"{path}: DC-Gen models are read from .safetensors only.")
    return load_file(path, autoencoder, options)


def load_file(path: Path, autoencoder: str, options: dict[str, Any]) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a single file with diffusers or original key names, with or without a prefix."""
    weights = Weights.of_file(path).without_prefix(FLUX.prefixes)
    if not FLUX.matches(weights.shapes):
        first = ", ".join(sorted(weights.shapes)[:4])
        raise ValueError(f"{path}: no FLUX keys (first: {first}). Choose a merged DC-Gen FLUX.")
    config = FLUX.detect(weights.shapes)
    space = _space(weights, config["in_channels"], autoencoder, path)
    info = ModelInfo(space, patch_size(config["in_channels"], space.channels, str(path)), schedule_of(space))
    if not FLUX.is_native(weights.shapes):
        return load_diffusers_flux(weights, config, info, options)

    def parts() -> Iterable[dict[str, Tensor]]:
        return (weights.read(keys) for keys in by_module(weights.shapes, str))

    return load_flux(parts, config, info, weights.shapes, options)


def _space(weights: Weights, packed: int, autoencoder: str, path: Path) -> LatentSpace:
    if METADATA_KEY in weights.metadata:
        return LatentSpace.from_metadata(weights.metadata)
    if autoencoder != FROM_FILE:
        return SPACES[autoencoder]
    fits = [name for name, space in SPACES.items() if space.channels == packed]
    raise ValueError(
        f"{path} does not say which autoencoder its latents come from. Choose it in `autoencoder`; of the published "
        f"ones these have its {packed} channels: {', '.join(fits) or 'none'}."
    )

"""Models by name: release folders in models/diffusers, merged single files in models/diffusion_models."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import folder_paths
import torch

from ...dcgen.files import naming
from ...dcgen.jsons import read_object
from ...dcgen.release import Model, open_model
from ...dcgen.spaces import SPACES
from .boundary import reading
from .families import family_of_class
from .family import Family
from .kl_vae import load_kl_vae
from .loader import load
from .quantized import load_quantized, quantized_file
from .toy import listing_root
from .vae import make_vae

INDEX = "model_index.json"
FROM_FILE = "from the file"
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
_DEPTH = 3


def release_names() -> list[str]:
    """Release folders in models/diffusers and its extra paths, as paths relative to their root."""
    names: dict[str, None] = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        names.update({folder.relative_to(listing_root(root)).as_posix(): None for folder in _with_index(root)})
    return list(names)


def _with_index(root: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        children[:] = [] if depth >= _DEPTH or INDEX in files else sorted(c for c in children if not c.startswith("."))
        if INDEX in files and depth:
            yield Path(folder)


def find_release(name: str) -> Path:
    """The folder of a name from release_names(); ValueError lists the folders that were searched.

    No other path is accepted: an untrusted graph can pass any text here through a link.
    """
    roots = folder_paths.get_folder_paths("diffusers")
    for root in map(Path, roots if name in release_names() else ()):
        folder = listing_root(root) / name
        if (folder / INDEX).is_file():
            return folder
    raise ValueError(f"no release {name!r} (a folder with {INDEX}) in {', '.join(roots)}. Put it in models/diffusers.")


def load_release(
    name: str, weight_dtype: str = "default"
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a release folder of any family, DC-Gen or base."""
    folder = find_release(name)
    index = read_object(folder / INDEX)
    _family_of(folder, index)
    return load_weights(folder, weight_dtype, FROM_FILE), load_text(folder), load_vae(folder, index)


def load_text(folder: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """CLIP of a release folder."""
    index = read_object(folder / INDEX)
    with reading(folder):
        clip = _family_of(folder, index).load_text(folder, index, disable_dynamic)
    clip.patcher.cached_patcher_init = (_text_patcher, (folder,))
    return clip


def _family_of(folder: Path, index: dict[str, Any]) -> Family:
    with reading(folder / INDEX), naming(folder):
        return family_of_class(index.get("transformer", [None, None])[1])


def _text_patcher(folder: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_text(folder, disable_dynamic).patcher


def load_vae(folder: Path, index: dict[str, Any]) -> comfy.sd.VAE:
    """VAE of a release folder: core's own class for an f8 AutoencoderKL, ours for a DC-AE.

    When model_index.json says that the release has no VAE, it is core's empty VAE, which raises an error when used.
    """
    if index.get("vae") == [None, None]:
        logging.info("DC-Gen: %s comes without an autoencoder; load its VAE with another node", folder)
        return comfy.sd.VAE(sd={})
    file = folder / "vae" / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no vae/config.json, so it is not a whole release. Download it again.")
    config = read_object(file)
    with reading(folder / "vae"):
        if config.get("_class_name") == "AutoencoderKL":
            return load_kl_vae(folder / "vae", config)
        return make_vae(folder / "vae")


def native_pixels(folder: Path) -> int | None:
    """Native image side in pixels from the autoencoder's config, if it has one (1024 for FLUX)."""
    file = folder / "vae" / "config.json"
    size = read_object(file).get("sample_size") if file.is_file() else None
    return size if isinstance(size, int) else None


def model_names() -> list[str]:
    """All choices of DCGenModelLoader."""
    return [*release_names(), *folder_paths.get_filename_list("diffusion_models")]


def autoencoder_names() -> list[str]:
    """Latent spaces to choose from for a file that does not name its own."""
    return [FROM_FILE, *SPACES]


def model_path(name: str) -> Path:
    """The path of a name from model_names(); any other name is an error."""
    if name in release_names():
        return find_release(name)
    return Path(folder_paths.get_full_path_or_raise("diffusion_models", name))


def load_model(name: str, weight_dtype: str, autoencoder: str) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a name from model_names()."""
    return load_weights(model_path(name), weight_dtype, autoencoder)


def load_weights(
    path: Path, weight_dtype: str, autoencoder: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a release folder or a single file; core can load it again through cached_patcher_init."""
    with reading(path):
        patcher = _load_weights(path, WEIGHT_DTYPES[weight_dtype], autoencoder, disable_dynamic)
    patcher.cached_patcher_init = (load_weights, (path, weight_dtype, autoencoder))
    return patcher


def _load_weights(
    path: Path, options: dict[str, Any], autoencoder: str, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    file = quantized_file(path)
    if file is not None:
        return load_quantized(file, SPACES.get(autoencoder), options, disable_dynamic)
    model = _with_latent(open_model(path), autoencoder, path)
    return load(model, native_pixels(path) if path.is_dir() else None, options, disable_dynamic)


def _with_latent(model: Model, autoencoder: str, path: Path) -> Model:
    """The model with its latent space: its own, else the one that the user chose."""
    if model.latent is not None:
        return model
    channels = model.backbone.packed_channels(model.config)
    if autoencoder == FROM_FILE:
        candidates = [name for name, space in SPACES.items() if space.channels == channels]
        raise ValueError(
            f"{path} does not say which autoencoder its latents come from. Choose it in `autoencoder`; of the "
            f"published ones these have its {channels} channels: {', '.join(candidates) or 'none'}."
        )
    return model.on_latent(SPACES[autoencoder])

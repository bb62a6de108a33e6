"""Models by name: release folders in models/diffusers, merged single files in models/diffusion_models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import folder_paths
import torch

from ...dcgen.folder import MODEL_INDEX, VAE, Release
from ...dcgen.release import Model, model_of, model_of_release
from ...dcgen.spaces import SPACES
from ...dcgen.tensors import Tensors
from .boundary import reading
from .families import family_of_class
from .family import Family
from .kl_vae import load_kl_vae
from .listing import listed
from .loader import load
from .quantized import load_quantized, quantized_file
from .vae import make_vae

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
    return list(_releases())


def _releases() -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name, folder in listed(map(Path, folder_paths.get_folder_paths("diffusers")), MODEL_INDEX, _DEPTH):
        folders.setdefault(name, folder)
    return folders


def find_release(name: str) -> Path:
    """The folder of a name from release_names(); ValueError lists the folders that were searched."""
    folder = _releases().get(name)
    if folder is None:
        searched = ", ".join(folder_paths.get_folder_paths("diffusers"))
        raise ValueError(
            f"no release {name!r} (a folder with {MODEL_INDEX}) in {searched}. Put it in models/diffusers."
        )
    return folder


def load_release(
    name: str, weight_dtype: str = "default"
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a release folder of any family, DC-Gen or base."""
    release = Release(find_release(name))
    family = _family_of(release)
    return load_network(release, weight_dtype), load_text(release, family), load_vae(release)


def _family_of(release: Release) -> Family:
    """The family that model_index.json names."""
    with reading(release.path / MODEL_INDEX):
        return family_of_class(release.index.get("transformer", [None, None])[1])


def load_network(
    release: Release, weight_dtype: str = "default", autoencoder: str = FROM_FILE, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a release folder."""
    with reading(release.path):
        patcher = _loaded(release.weights, release, weight_dtype, autoencoder, disable_dynamic)
    patcher.cached_patcher_init = (load_weights, (release.path, weight_dtype, autoencoder))
    return patcher


def _loaded(
    tensors: Tensors, release: Release | None, weight_dtype: str, autoencoder: str, disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    """MODEL of an opened network, plain or quantized, in a release or on its own."""
    options, file = WEIGHT_DTYPES[weight_dtype], quantized_file(tensors)
    if file is not None:
        return load_quantized(file, SPACES.get(autoencoder), options, disable_dynamic)
    model = model_of_release(release) if release else model_of(tensors)
    return load(_on_a_latent(model, autoencoder, release.path if release else tensors.path), options, disable_dynamic)


def load_text(release: Release, family: Family | None = None, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """CLIP of a release folder. family: the release's, if it is known already."""
    family = family or _family_of(release)
    with reading(release.path):
        clip = family.load_text(release, disable_dynamic)
    clip.patcher.cached_patcher_init = (_text_patcher, (release.path,))
    return clip


def _text_patcher(folder: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_text(Release(folder), disable_dynamic=disable_dynamic).patcher


def load_vae(release: Release) -> comfy.sd.VAE:
    """VAE of a release folder: core's own class for an f8 AutoencoderKL, ours for a DC-AE.

    When model_index.json says that the release has no VAE, it is core's empty VAE, which raises an error when used.
    """
    if release.index.get(VAE) == [None, None]:
        logging.info("DC-Gen: %s comes without an autoencoder; load its VAE with another node", release.path)
        return comfy.sd.VAE(sd={})
    with reading(release.path / VAE):
        autoencoder = release.autoencoder
        if autoencoder is None:
            raise ValueError(f"{release.path} has no vae/config.json, so it is not a whole release. Download it again.")
        return make_vae(autoencoder.dcae_source()) if autoencoder.is_dcae else load_kl_vae(autoencoder)


def model_names() -> list[str]:
    """All choices of DCGenModelLoader."""
    return [*release_names(), *folder_paths.get_filename_list("diffusion_models")]


def autoencoder_names() -> list[str]:
    """Latent spaces to choose from for a file that does not name its own."""
    return [FROM_FILE, *SPACES]


def model_path(name: str) -> Path:
    """The path of a name from model_names(); any other name is an error."""
    return _releases().get(name) or Path(folder_paths.get_full_path_or_raise("diffusion_models", name))


def load_model(name: str, weight_dtype: str, autoencoder: str) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a name from model_names()."""
    return load_weights(model_path(name), weight_dtype, autoencoder)


def load_weights(
    path: Path, weight_dtype: str, autoencoder: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a release folder or a single file; core can load it again through cached_patcher_init."""
    if path.is_dir():
        return load_network(Release(path), weight_dtype, autoencoder, disable_dynamic)
    with reading(path):
        patcher = _loaded(Tensors.open(path), None, weight_dtype, autoencoder, disable_dynamic)
    patcher.cached_patcher_init = (load_weights, (path, weight_dtype, autoencoder))
    return patcher


def _on_a_latent(model: Model, autoencoder: str, path: Path) -> Model:
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

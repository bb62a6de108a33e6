"""Adds the toy models that ship with the pack to ComfyUI's search paths, so that nothing has to be copied."""

from __future__ import annotations

from pathlib import Path

import folder_paths

TOY = Path(__file__).resolve().parents[2] / "toy"
# ComfyUI's folder name -> folder of such files in toy/. Search paths are added after the user's own.
# The toy's autoencoder is listed by vae_files: core's VAE loader cannot read it.
FOLDERS = {"diffusers": TOY, "model_patches": TOY / "adapter"}


def listing_root(root: Path) -> Path:
    """The folder that names in a search path are relative to; the toy's names start with toy/, to be recognisable."""
    return TOY.parent if root == TOY else root


def register() -> None:
    """Add the toy's folders, if they exist, to ComfyUI's search paths."""
    for name, folder in FOLDERS.items():
        if folder.is_dir():
            folder_paths.add_model_folder_path(name, str(folder))

"""The toy release that ships with the pack is found like any installed model, without copying anything."""

from __future__ import annotations

from pathlib import Path

import folder_paths

TOY = Path(__file__).resolve().parents[2] / "toy"
# ComfyUI's folder -> where in toy/ such files lie. Search paths are added after the user's own, never in front.
# Its autoencoder is listed by vae_files: core's VAE loader could not read it.
PLACES = {"diffusers": TOY, "model_patches": TOY / "adapter"}


def listing_root(root: Path) -> Path:
    """What the names of a search path's folders are relative to: the toy's say toy/, to be taken for nothing else."""
    return TOY.parent if root == TOY else root


def register() -> None:
    """Add the toy's folders to ComfyUI's search paths, those that exist."""
    for name, folder in PLACES.items():
        if folder.is_dir():
            folder_paths.add_model_folder_path(name, str(folder))

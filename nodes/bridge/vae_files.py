"""DC-AE autoencoders by name: .safetensors files and diffusers folders in models/vae, and the toy's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...dcgen.jsons import read_object
from .toy import TOY, listing_root
from .vae import DCAEVAE, make_vae

CONFIG = "config.json"
_DEPTH = 2


def names() -> list[str]:
    """Folders with an AutoencoderDC, then the files of models/vae."""
    return [*_folders(), *folder_paths.get_filename_list("vae")]


def _folders() -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for root in [*map(Path, folder_paths.get_folder_paths("vae")), TOY]:
        for folder in _with_config(root):
            folders.setdefault(folder.relative_to(listing_root(root)).as_posix(), folder)
    return folders


def _with_config(root: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        children[:] = [] if depth >= _DEPTH else sorted(child for child in children if not child.startswith("."))
        if depth and CONFIG in files and _is_dcae(Path(folder) / CONFIG):
            yield Path(folder)


def _is_dcae(config: Path) -> bool:
    try:
        values = read_object(config)
        # diffusers' class name, or the model name in mit-han-lab's and dc-ai's repositories
        return values.get("_class_name") == "AutoencoderDC" or str(values.get("model_name")).startswith("dc-ae")
    except (OSError, ValueError, AttributeError):
        return False


def path_of(name: str) -> Path:
    """The path of a name from names(); any other name is an error."""
    return _folders().get(name) or Path(folder_paths.get_full_path_or_raise("vae", name))


def load(name: str, scaling_factor: float | None = None) -> DCAEVAE:
    """VAE of a name from names(); errors name the file."""
    return make_vae(path_of(name), scaling_factor=scaling_factor)

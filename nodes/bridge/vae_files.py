"""DC-AE autoencoders by name: .safetensors files and diffusers folders below models/vae, and the toy's."""

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
    """Folders that hold an AutoencoderDC first, then the files of models/vae."""
    return [*_folders(), *folder_paths.get_filename_list("vae")]


def _folders() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in [*map(Path, folder_paths.get_folder_paths("vae")), TOY]:
        for folder in _with_config(root):
            found.setdefault(folder.relative_to(listing_root(root)).as_posix(), folder)
    return found


def _with_config(root: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(root, followlinks=True):
        depth = len(Path(folder).relative_to(root).parts)
        children[:] = [] if depth >= _DEPTH else sorted(child for child in children if not child.startswith("."))
        if depth and CONFIG in files and _is_dcae(Path(folder) / CONFIG):
            yield Path(folder)


def _is_dcae(config: Path) -> bool:
    try:
        values = read_object(config)
        # diffusers' class, or the name that mit-han-lab and dc-ai repositories give
        return values.get("_class_name") == "AutoencoderDC" or str(values.get("model_name")).startswith("dc-ae")
    except (OSError, ValueError, AttributeError):
        return False


def path_of(name: str) -> Path:
    """Where a name from names() lies; an error that names it when it is none."""
    return _folders().get(name) or Path(folder_paths.get_full_path_or_raise("vae", name))


def load(name: str, scaling_factor: float | None = None) -> DCAEVAE:
    """VAE of a name from names(); errors name the file."""
    return make_vae(path_of(name), scaling_factor=scaling_factor)

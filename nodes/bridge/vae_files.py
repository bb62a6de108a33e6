"""DC-AE autoencoders by name: .safetensors files and diffusers folders in models/vae, and the toy's."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...dcgen.jsons import read_object
from .listing import listed
from .toy import TOY
from .vae import DCAEVAE, make_vae

CONFIG = "config.json"
_DEPTH = 2


def names() -> list[str]:
    """Folders with an AutoencoderDC, then the files of models/vae."""
    return [*_folders(), *folder_paths.get_filename_list("vae")]


def _folders() -> dict[str, Path]:
    folders: dict[str, Path] = {}
    roots = [*map(Path, folder_paths.get_folder_paths("vae")), TOY]
    for name, folder in listed(roots, CONFIG, _DEPTH, nested=True):
        if name not in folders and _is_dcae(folder / CONFIG):
            folders[name] = folder
    return folders


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

"""Which ComfyUIs the tests run on, and in which modes. Loaded by path."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
MODES = {"legacy": "plain --cpu", "dynamic": "--cpu with dynamic VRAM, the default on NVIDIA cards, simulated"}


@dataclass(frozen=True)
class Setting:
    """One ComfyUI in one of its modes."""

    root: Path
    version: str
    mode: str
    label: str

    @property
    def python(self) -> str:
        """ComfyUI's own interpreter."""
        places = [f"{name}/{tail}" for name in (".venv", "venv") for tail in ("bin/python", "Scripts/python.exe")]
        places.append("../python_embeded/python.exe")  # of the portable ComfyUI for Windows
        return next((str(self.root / place) for place in places if (self.root / place).exists()), sys.executable)


def is_comfyui(place: Path) -> bool:
    return (place / "main.py").is_file() and (place / "comfy" / "model_patcher.py").is_file()


def find_comfyuis(named: str | None, pack: Path = PACK, home: Path | None = None) -> list[Path]:
    """Those that COMFYUI_PATH names (`named`); without it, all in the usual places, each once."""
    if named:
        places = [Path(place).expanduser() for place in named.split(os.pathsep) if place]
        wrong = [str(place) for place in places if not is_comfyui(place)]
        if wrong:
            raise ValueError(
                f"COMFYUI_PATH names {', '.join(wrong)}, where there is no main.py with comfy/model_patcher.py. "
                f"Name folders of ComfyUI, several with {os.pathsep!r} between them, or unset it."
            )
    else:
        home = home or Path.home()
        places = [pack.parents[1], home / "ComfyUI", *sorted(home.glob("ComfyUI-*")), home / "comfy" / "ComfyUI"]
    return list(dict.fromkeys(place.resolve() for place in places if is_comfyui(place)))


def version_of(root: Path) -> str:
    file = root / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text()) if file.is_file() else None
    return found[1] if found else "unknown"


def modes_of(root: Path) -> list[str]:
    """Dynamic VRAM is a mode where the core has it; 0.8.0 has not."""
    file = root / "comfy" / "memory_management.py"
    dynamic = file.is_file() and "aimdo_enabled" in file.read_text()
    return ["legacy", "dynamic"] if dynamic else ["legacy"]


def settings_of(roots: list[Path]) -> list[Setting]:
    """Every mode of every ComfyUI; the labels differ, by the folders' names where versions do not."""
    versions = [version_of(root) for root in roots]
    found = []
    for i, (root, version) in enumerate(zip(roots, versions, strict=True)):
        name = version if versions.count(version) == 1 else f"{version}@{i + 1}-{root.name}"
        found += [Setting(root, version, mode, f"{name}-{mode}") for mode in modes_of(root)]
    return found

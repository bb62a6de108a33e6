"""Room on disk, asked for before it is needed: a training is not begun whose result would not fit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

ADAM = 12  # bytes a trained parameter has in a checkpoint: float32 weight and AdamW's two moments
EMA = 4  # and its moving average


class NoSpace(OSError):
    """The disk has too little room for what is about to be written; the message says how much is needed for what."""


def checkpoint_bytes(trained: int, ema: bool) -> int:
    """Size of a checkpoint of so many trained parameters."""
    return trained * (ADAM + EMA if ema else ADAM)


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def check_space(folder: Path, needed: Mapping[str, int], remedy: str) -> None:
    """NoSpace unless the disk of `folder` has room for all that is needed, in bytes by use."""
    total, free = sum(needed.values()), free_bytes(folder)
    if total <= free:
        return
    uses = ", ".join(f"{name} {size_text(size)}" for name, size in needed.items() if size)
    raise NoSpace(
        f"{folder}: {size_text(free)} are free on its disk, about {size_text(total)} are needed ({uses}); {remedy}"
    )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not be there yet."""
    while not folder.exists() and folder.parent != folder:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

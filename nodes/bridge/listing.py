"""Model folders in ComfyUI's search paths, by the file that marks them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .toy import listing_root


def listed(roots: Iterable[Path], marker: str, depth: int, nested: bool = False) -> Iterator[tuple[str, Path]]:
    """(name, folder) of all folders with the file `marker` in these search paths.

    Names are relative to their search path, with "/". Only these are accepted from a graph, which is untrusted and can
    hold any text. depth: levels below a search path; nested: also folders inside of one that has the file.
    """
    for root in roots:
        base = len(listing_root(root).parts)
        for folder in _marked(root, marker, depth, nested):
            yield "/".join(folder.parts[base:]), folder


def _marked(root: Path, marker: str, depth: int, nested: bool) -> Iterator[Path]:
    """The folders below `root` with the file `marker`, in the order of their names, without hidden ones.

    One test of a file per folder: what a release holds is not listed.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
    except OSError:  # not there, or not ours to read
        return
    for name in names:
        folder = root / name
        marked = os.path.isfile(os.path.join(root, name, marker))
        if marked:
            yield folder
        if depth > 1 and (nested or not marked):
            yield from _marked(folder, marker, depth - 1, nested)

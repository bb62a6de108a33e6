"""Input checks of the nodes, and cache keys that change when a file is replaced."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ..dcgen.files import disk_state


def numbers(**values: float) -> None:
    """ValueError, naming the input, for NaN and infinity, which only scripts can post."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}, which is not a number. Set it to one.")


def state_of(find: Callable[[str], str | Path], name: str | None) -> str:
    """For fingerprint_inputs: changes when the file or folder of that name is replaced, so that it is read again.

    name is None when it comes through a link. A missing file is reported when the node runs.
    """
    if name is None:
        return ""
    try:
        return disk_state(find(name))
    except (OSError, ValueError):
        return ""

"""What nodes check of their inputs, and what tells the core that a file was replaced."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ..dcgen.files import disk_state


def numbers(**values: float) -> None:
    """ValueError, naming the input, for one that is NaN or infinite: scripts can post those, the page cannot."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}, which is no number. Set it to one.")


def state_of(find: Callable[[str], str | Path], name: str | None) -> str:
    """For fingerprint_inputs: changes when the file or folder of that name is replaced, so that it is read anew.

    name is None where it comes through a link. A name that is not there is said when the node runs.
    """
    if name is None:
        return ""
    try:
        return disk_state(find(name))
    except (OSError, ValueError):
        return ""

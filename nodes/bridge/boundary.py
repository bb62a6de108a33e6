"""Where files of strangers come in: whatever a damaged one makes stumble becomes an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .vae import out_of_memory

STUMBLES = (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError)
AGAIN = "Download it again"


@contextmanager
def reading(part: Path) -> Iterator[None]:
    """Around the reading of a file, or of a part of a release folder: any error comes out as one that names it."""
    try:
        yield
    except STUMBLES as error:
        if out_of_memory(error):
            raise
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{part}: a file there is damaged or is not what its name says ({found}). {AGAIN}.") from error
    except ValueError as error:
        if part.name in str(error):
            raise
        raise ValueError(f"{part}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}). {AGAIN}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}. {AGAIN}.")
    return values

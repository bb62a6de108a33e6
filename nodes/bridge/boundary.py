"""Where files of strangers come in: whatever a damaged one makes stumble becomes an error that names it.

JSON is read by dcgen.jsons, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

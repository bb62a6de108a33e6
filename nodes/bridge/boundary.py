"""Reading untrusted files: any exception that a damaged file causes becomes an error that names the file.

JSON is always read by dcgen.jsons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .vae import out_of_memory

READ_ERRORS = (TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError)
REMEDY = "Download it again"


@contextmanager
def reading(part: Path) -> Iterator[None]:
    """While a file or a part of a release folder is read: every error is raised again with its name."""
    try:
        yield
    except READ_ERRORS as error:
        if out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"{part}: a file there is damaged or not what its name says ({cause}). {REMEDY}.") from error
    except ValueError as error:
        if part.name in str(error):
            raise
        raise ValueError(f"{part}: {error}") from error

"""JSON from untrusted files: limited in size and depth, with valid text only; errors name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
MAX_DEPTH = 64  # our configs and diffusers' have at most 6; code that uses a value may recurse


def parse_json(text: str | bytes, where: str, limit: int = MAX_BYTES) -> Any:
    """The value of a JSON text; the message of a ValueError begins with `where`.

    A byte-order mark is skipped. Nesting beyond MAX_DEPTH and lone surrogates are errors.
    """
    if len(text) > limit:
        raise ValueError(f"{where}: more than {limit} bytes of JSON; so much is not read")
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: not UTF-8 text ({error}); save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON: nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); it was cut short or edited: fetch it again") from error
    _check(value, where)
    return value


def parse_object(text: str | bytes, where: str, limit: int = MAX_BYTES) -> dict[str, Any]:
    """As parse_json, of a JSON object."""
    return _object(parse_json(text, where, limit), where)


def read_json(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file; FileNotFoundError or ValueError name the file."""
    path = Path(path)
    if not path.is_file():  # also rejects pipes and devices, which may never end
        raise FileNotFoundError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return parse_json(file.read(min(size, limit) + 1), str(path), limit)


def read_object(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> dict[str, Any]:
    """As read_json, of a JSON object."""
    return _object(read_json(path, limit), str(path))


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object but a {type(value).__name__}")
    return value


def _check(value: Any, where: str) -> None:
    """Check level by level, without recursion."""
    level, depth = [value], 0
    while level:
        if depth >= MAX_DEPTH and any(isinstance(item, dict | list) for item in level):
            raise ValueError(f"{where}: not valid JSON: nested more than {MAX_DEPTH} deep")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str) and not item.isascii():
                _check_text(item, where)
        level, depth = inner, depth + 1


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid JSON: it holds half a character ({error})") from error

"""The schema of a node, as far as the installed core knows its fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """io.Schema without the fields that an older core has not (search_aliases: not in 0.8.0)."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})

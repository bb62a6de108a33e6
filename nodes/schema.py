"""Node schemas with only the fields that the installed ComfyUI has."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """io.Schema without the fields that older versions lack (0.8.0 has no search_aliases)."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})

"""Type and range checks for the fields of files, as data; errors name field and value."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[str, Any], None]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
shown = _short.repr


def whole(low: int, high: int) -> Check:
    """A whole number from low to high; not 32.0 or true."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} is {shown(value)}, expected a whole number from {low} to {high}")

    return check


def real(low: float, high: float) -> Check:
    """A number from low to high; not NaN, nor an integer too large for a float."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} is {shown(value)}, expected a number from {low:g} to {high:g}")

    return check


def flag(name: str, value: Any) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, expected true or false")


def mapping(name: str, value: Any) -> None:
    """An object with any fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, expected an object with fields")


def words(*known: str) -> Check:
    """One of the known words."""

    def check(name: str, value: Any) -> None:
        if value not in known or not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}, expected one of {', '.join(known)}")

    return check


def text(limit: int) -> Check:
    """Text of at most `limit` characters."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > limit:
            raise ValueError(f"{name} is {shown(value)}, expected text of at most {limit} characters")

    return check


def items(item_check: Check, minimum: int, maximum: int) -> Check:
    """A list of `minimum` to `maximum` values that all pass `item_check`."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or not minimum <= len(value) <= maximum:
            count = f"{minimum} to {maximum}" if minimum < maximum else f"{minimum}"
            raise ValueError(f"{name} is {shown(value)}, expected a list of {count} values")
        for position, item in enumerate(value):
            item_check(f"{name}[{position}]", item)

    return check


def optional(check: Check) -> Check:
    """A value that passes `check`, or null."""
    return lambda name, value: None if value is None else check(name, value)


def check_fields(values: Mapping[str, Any], table: Mapping[str, Check], needed: tuple[str, ...] = ()) -> None:
    """ValueError for the first field of `values` that fails its check, or that is needed and missing.

    Fields that are not in the table are not checked.
    """
    for name in needed:
        if name not in values:
            raise ValueError(f"{name} is missing")
    for name, check in table.items():
        if name in values:
            check(name, values[name])

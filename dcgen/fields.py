"""What a field of a file may hold: a type and bounds, said once as data, and an error that names field and value."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[str, Any], None]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
shown = _short.repr


def whole(low: int, high: int) -> Check:
    """A whole number from low to high; 32.0 and true are none."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} is {shown(value)}, expected a whole number from {low} to {high}")

    return check


def real(low: float, high: float) -> Check:
    """A number from low to high. NaN, and an integer too large for a float, are outside of any bounds."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} is {shown(value)}, expected a number from {low:g} to {high:g}")

    return check


def flag(name: str, value: Any) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, expected true or false")


def mapping(name: str, value: Any) -> None:
    """An object of any fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, expected an object with fields")


def words(*known: str) -> Check:
    """One of the known words."""

    def check(name: str, value: Any) -> None:
        if value not in known or not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}, expected one of {', '.join(known)}")

    return check


def text(most: int) -> Check:
    """Text of at most so many characters."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > most:
            raise ValueError(f"{name} is {shown(value)}, expected text of at most {most} characters")

    return check


def items(each: Check, least: int, most: int) -> Check:
    """A list of `least` to `most` values, each of which passes."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            count = f"{least} to {most}" if least < most else f"{least}"
            raise ValueError(f"{name} is {shown(value)}, expected a list of {count} values")
        for position, item in enumerate(value):
            each(f"{name}[{position}]", item)

    return check


def optional(check: Check) -> Check:
    """What passes `check`, or null."""
    return lambda name, value: None if value is None else check(name, value)


def check_fields(values: Mapping[str, Any], table: Mapping[str, Check], needed: tuple[str, ...] = ()) -> None:
    """ValueError for the first field of `values` that its check refuses, or that is needed and absent.

    Fields that the table does not have are nobody's business here.
    """
    for name in needed:
        if name not in values:
            raise ValueError(f"{name} is missing")
    for name, check in table.items():
        if name in values:
            check(name, values[name])

"""Captions from untrusted files: one way to read text, JSON and lines of JSON, for every source of captions."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dcgen.fields import shown
from dcgen.jsons import parse_object
from train.samples import printable, sample

SUFFIXES = (".txt", ".caption")  # of a text file beside an image, in this order
FIELDS = ("caption", "text")  # of a JSON object, in this order
MAX_CHARACTERS = 1 << 16  # of a caption
MAX_BYTES = 1 << 24  # of a text or JSON file with one caption, and of a line of JSON
MAX_LINES_BYTES = 1 << 30  # of a file of lines that is read whole
BOMS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
Encoding = Literal["utf-8", "cp1250", "cp1251", "cp1252", "latin-1", "shift_jis", "euc_kr", "big5", "gb18030"]


class Weighted(str):
    """A caption that is one of several of an image, taken with a probability in proportion to its weight."""

    weight: float = 1.0


def weight_of(caption: str) -> float:
    """The weight of a caption: 1 unless its file says another."""
    return caption.weight if isinstance(caption, Weighted) else 1.0


def encoding_of(data: bytes, default: str = "utf-8") -> str:
    """The encoding that a byte-order mark at the beginning of `data` names, else `default`."""
    return next((name for mark, name in BOMS if data.startswith(mark)), default)


def text_of(data: bytes, encoding: str = "utf-8", remedy: str = "save it as UTF-8") -> str:
    """Text with or without a byte-order mark; without one it is in `encoding`.

    Nothing is guessed: bytes that are not text in it are a ValueError, which ends in `remedy`, and so is NUL.
    """
    name = encoding_of(data, encoding)
    try:
        text = data.decode(name)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {name} text (byte {error.start}: {error.reason}); {remedy}") from None
    if "\0" in text:
        raise ValueError(f"a NUL at character {text.index(chr(0))}: not text, or UTF-16 without a byte-order mark")
    return text


def read_bounded(file: BinaryIO, limit: int = MAX_BYTES) -> bytes:
    """What is left of a file; ValueError where that is more than `limit` bytes, of which no more is read."""
    data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes of text; so much is not read")
    return data


def captions_of(value: Any) -> list[str]:
    """The captions that a value of JSON or of a table stands for: none, one, or alternatives.

    null stands for none, a text for itself without spaces around it (an empty one is the empty caption), a whole number
    for a class, a list for alternatives, each a text or {"text": ..., "weight": ...}. Anything else, half a character,
    a NUL, and more than MAX_CHARACTERS are a ValueError.
    """
    if value is None:
        return []
    if isinstance(value, list):
        return [_alternative(str(item) if _is_number(item) else item) for item in value]
    return [_checked(str(value) if _is_number(value) else value)]


def captions_of_object(value: dict[str, Any]) -> list[str]:
    """The captions of a JSON object: its field `caption`, else `text`."""
    return next((found for field in FIELDS if (found := captions_of(value.get(field)))), [])


def captions_of_json(data: bytes, where: str) -> list[str]:
    """The captions of a JSON file with one object."""
    return captions_of_object(parse_object(text_of(data), where))


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line of a file of JSON lines; empty lines are passed over.

    Lines end at a line feed only. A SampleError names file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(_byte_lines(file, path), start=1):
            where = f"{printable(str(path))}, line {number}"
            with sample(where):
                row = parse_object(text_of(line), where, MAX_BYTES) if line.strip() else None
            if row is not None:
                yield number, row


def _byte_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file in UTF-8, one at a time; a file in UTF-16 or 32 is read whole for it."""
    mark = encoding_of(file.read(4))
    file.seek(len(codecs.BOM_UTF8) if mark == "utf-8-sig" else 0)
    if mark in ("utf-8", "utf-8-sig"):
        yield from iter(lambda: file.readline(MAX_BYTES + 1), b"")
    else:
        with sample(printable(str(path))):
            text = text_of(read_bounded(file, MAX_LINES_BYTES))
        yield from text.encode("utf-8").split(b"\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of prompts that are not empty, without spaces around them; a SampleError names it."""
    with sample(printable(str(path))), open(path, "rb") as file:
        lines = text_of(read_bounded(file, MAX_LINES_BYTES)).replace("\r", "\n").split("\n")
        return [_checked(line) for line in lines if line.strip()]


def _alternative(item: Any) -> str:
    if not isinstance(item, dict):
        return _checked(item)
    weight = item.get("weight", 1.0)
    if set(item) - {"text", "weight"} or "text" not in item:
        raise ValueError(f'a caption of several is {shown(item)}, expected a text or {{"text": ..., "weight": ...}}')
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise ValueError(f"the weight of a caption is {shown(weight)}, expected a number above 0")
    caption = Weighted(_checked(item["text"]))
    caption.weight = float(weight)
    return caption


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a caption is {shown(text)}, expected text, a list of texts, a class number or null")
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a caption of {len(text)} characters, expected at most {MAX_CHARACTERS}")
    if "\0" in text:
        raise ValueError("a caption with a NUL in it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a caption with half a character in it") from None
    return text

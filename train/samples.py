"""Samples of a data set: the error that names one, the count of those left out, and the files under a folder."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SHOWN = 5  # names that a message has room for
NAME_LENGTH, REASON_LENGTH = 300, 500  # characters of a name and of a decoder's own words in a message


class SampleError(ValueError):
    """A sample that cannot be read. The message begins with its file (and tar member or row) and says why."""


@contextmanager
def sample(where: str) -> Iterator[None]:
    """The boundary around the reading of one sample: what goes wrong inside is a SampleError that begins with `where`.

    Decoders answer damaged files with errors of any class (SyntaxError, struct.error, IndexError, ...), so every
    Exception is taken; a SampleError from a boundary further inside, which names the place more exactly, passes.
    """
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(_message(where, error)) from error


def _message(where: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{where}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"{where}: not enough memory to read it"
    text = printable(str(error), REASON_LENGTH) or type(error).__name__
    return text if text.startswith(where) else f"{where}: {text}"


def printable(text: str, length: int = NAME_LENGTH) -> str:
    """`text` as valid Unicode without control characters, at most `length` characters of it: fit for messages and JSON.

    Bytes of a file name that are no UTF-8, which Python holds as lone surrogates, become \\xNN.
    """
    valid = text.encode("utf-8", "surrogateescape" if _from_bytes(text) else "backslashreplace")
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in valid.decode("utf-8", "backslashreplace")[: length + 1]
    )
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def _from_bytes(text: str) -> bool:
    return all("\udc80" <= c <= "\udcff" for c in text if "\ud800" <= c <= "\udfff")


class Skipped:
    """What a data set holds and training does not use, counted by reason, with the first few names of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one more of this reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.names.setdefault(reason, [])
        if len(names) < SHOWN:
            names.append(name)

    def lines(self) -> list[str]:
        """One line a reason: "3 images without a caption: a.png, b.png, c.png"."""
        return [f"{count} {reason}: {first_names(self.names[reason], count)}" for reason, count in self.counts.items()]


def first_names(names: Collection[str], count: int, separator: str = ", ") -> str:
    """The names, and how many of `count` they leave unsaid."""
    more = count - len(names)
    return separator.join(names) + (f"{separator}and {more} more" if more else "")


Stamp = tuple[str, int, int]  # name, bytes, and time of change in ns: changes with the content of a file


@dataclass(frozen=True, slots=True)
class File:
    """A regular file under a data folder: its path, its name from that folder on, bytes, and time of change in ns."""

    path: Path
    name: str
    size: int
    changed: int

    @property
    def suffix(self) -> str:
        """In lower case."""
        return self.path.suffix.lower()

    @property
    def stamp(self) -> Stamp:
        return self.name, self.size, self.changed


def files_under(root: Path, skipped: Skipped) -> list[File]:
    """Every regular file under a folder, or `root` itself where it is a file; sorted by the parts of their paths.

    Links are followed. A folder that links reach a second time is listed once, which is counted; a link to a folder
    that it lies in is a ValueError. Names which begin with a dot (a Mac's `._a.png`) and `__MACOSX` are no data;
    links to nothing, pipes and devices are counted. A folder that cannot be listed is the OSError that names it.
    """
    if not root.is_dir():
        if not root.is_file():  # a pipe would be waited for
            raise ValueError(f"{printable(str(root))} is neither a folder nor a file")
        return [_file(root, root.name, root.stat())]
    found: list[File] = []
    top = _folder_key(root)
    seen = {top}
    waiting: list[tuple[Path, tuple[tuple[int, int], ...]]] = [(root, (top,))]
    while waiting:
        folder, above = waiting.pop()
        with os.scandir(folder) as listing:
            paths = sorted(Path(entry.path) for entry in listing if not _hidden(entry.name))
        for path in paths:
            name = _name(path, root)
            try:
                status = path.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                skipped.add("links to nothing", name)
                continue
            if stat.S_ISREG(status.st_mode):
                found.append(_file(path, name, status))
            elif not stat.S_ISDIR(status.st_mode):
                skipped.add("pipes, sockets or devices", name)
            elif (key := _folder_key(path)) in above:
                raise ValueError(f"{printable(str(path))}: a link that leads back to a folder it lies in; remove it")
            elif key in seen:
                skipped.add("folders that links reach twice, read once", name)
            else:
                seen.add(key)
                waiting.append((path, (*above, key)))
    return sorted(found, key=lambda file: file.path.parts)


def _file(path: Path, name: str, status: os.stat_result) -> File:
    return File(path, printable(name), status.st_size, status.st_mtime_ns)


def _name(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())


def _folder_key(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"

"""webdataset tars: indexed once (offset and length of every member), then read at random."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from train import captions, images
from train.samples import File, files_under, printable, sample
from train.sources.base import Files, FileSource, Found

KEY = re.compile(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)", re.DOTALL)  # folders may have dots; the key ends at the first after
HEADER_BYTES = 1 << 26  # of one extended header
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class TarData(Files):
    """webdataset tars: members KEY.jpg (or another image) and KEY.txt, KEY.caption or KEY.json with a `caption`.

    A key ends at the first dot of a member's name, in its last folder; upper-case endings are taken.
    """

    type: Literal["webdataset"]


class Place(NamedTuple):
    """Where the bytes of a member are."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Member:
    """A plain file in a tar; `fault` says why its bytes cannot be read."""

    name: str
    place: Place
    fault: str = ""


class TarSource(FileSource):
    """webdataset tars, one after the other. No tar stays open."""

    def scan(self, root: Path) -> Iterator[Found]:
        for file in files_under(root, self.skipped):
            if file.path.name.lower().endswith(COMPRESSED):
                self.skipped.add("compressed tars, which are not read: decompress them", file.name)
            elif file.suffix == ".tar" or file.path == root:
                yield from self._scan_tar(file)

    def _scan_tar(self, file: File) -> Iterator[Found]:
        with open(file.path, "rb") as handle:
            with sample(printable(str(file.path))):
                groups = self._groups(handle, file)
            for key, members in groups.items():
                name = f"{file.name}:{printable(key)}"
                pictures = [member for ending, member in members.items() if f".{ending}" in images.SUFFIXES]
                if not pictures and not any(map(_is_part, members)):
                    continue
                for other in pictures[1:]:
                    self.skipped.add("second images of a key", f"{file.name}:{printable(other.name)}")
                image = pictures[0] if pictures else None
                where = f"{printable(str(file.path))}: {printable(image.name if image else key)}"
                read = partial(self._captions, members, file.path)
                opened = partial(_window, handle, image) if image else None
                yield Found(name, where, read, opened, image and image.place, file.stamp)

    def open(self, place: Any) -> AbstractContextManager[BinaryIO]:
        return _Owned(place)

    def _groups(self, handle: BinaryIO, file: File) -> dict[str, dict[str, Member]]:
        """Key -> ending in lower case -> member, of all plain files that have a key."""
        groups: dict[str, dict[str, Member]] = {}
        for info in _members(handle, file.size):
            match = KEY.fullmatch(info.name)
            if match is None or "__MACOSX" in info.name.split("/"):
                continue
            if not info.isreg():
                self.skipped.add("links, devices or folders in a tar", f"{file.name}:{printable(info.name)}")
                continue
            fault = "a sparse file, which is not read: pack it plainly" if info.sparse is not None else ""
            member = Member(info.name, Place(file.path, info.offset_data, info.size), fault)
            key, ending = match[1], match[2].lower()
            if ending in groups.setdefault(key, {}):
                raise ValueError(f"{printable(info.name)} is in it twice; pack it anew")
            groups[key][ending] = member
        return groups

    def _captions(self, members: dict[str, Member], path: Path) -> list[str]:
        for ending in (*captions.SUFFIXES, ".json"):
            if ending[1:] not in members:
                continue
            member = members[ending[1:]]
            where = f"{printable(str(path))}: {printable(member.name)}"
            with sample(where), self.open(_checked(member)) as file:
                if ending == ".json":
                    return captions.captions_of_json(captions.read_bounded(file), where)
                return self.text(file)
        return []


def _is_part(ending: str) -> bool:
    """Whether a member with this ending speaks for a sample: a caption, or an image whose key ended too early."""
    last = "." + ending.rpartition(".")[2]
    return f".{ending}" in (*captions.SUFFIXES, ".json") or last in (*images.SUFFIXES, *images.OTHER_SUFFIXES)


def _checked(member: Member) -> Place:
    if member.fault:
        raise ValueError(member.fault)
    return member.place


def _members(handle: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar of `size` bytes. ValueError for one that is cut, compressed, or damaged."""
    if handle.read(2) == b"\x1f\x8b":
        raise ValueError("compressed with gzip; decompress it, so that members can be read at random")
    handle.seek(0)
    try:
        with tarfile.open(fileobj=cast(Any, _Capped(handle)), mode="r:") as archive:
            place = -1
            while (info := archive.next()) is not None:
                # older Pythons follow a negative size backwards, for ever
                if info.size < 0 or archive.offset <= place:
                    raise ValueError(f"{printable(info.name)} has size {info.size}: damaged")
                place = archive.offset
                yield info
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"not a whole tar ({error}); fetch or pack it anew") from error
    _check_end(handle, end, size)


def _check_end(handle: BinaryIO, end: int, size: int) -> None:
    """tarfile stops without a word at a damaged header, and where a file ends between two members."""
    handle.seek(end)
    block = handle.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError("no mark of the end: it was cut short; fetch or pack it anew")
    if block.strip(b"\0"):
        raise ValueError(f"a damaged header at byte {end}; fetch or pack it anew")
    if size - end > 1 << 24 or handle.read().strip(b"\0"):
        raise ValueError(f"it goes on behind the mark of its end at byte {end}: tars joined? Unpack and pack them anew")


class _Capped:
    """A file for tarfile of which no header makes it read, or reserve memory for, more than HEADER_BYTES."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle

    def read(self, length: int) -> bytes:
        if not 0 <= length <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {length} bytes")
        return self.handle.read(length)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return self.handle.seek(place, whence)

    def tell(self) -> int:
        return self.handle.tell()

    def close(self) -> None:
        """The handle is its owner's to close."""


class _Window(io.RawIOBase):
    """`length` bytes of an open file from `offset` on, as a file."""

    def __init__(self, handle: BinaryIO, place: Place) -> None:
        self.handle = handle
        self.begin, self.length = place.offset, place.length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if base + place < 0:
            raise ValueError(f"seek to {base + place}")
        self.position = base + place
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.length - self.position))
        self.handle.seek(self.begin + self.position)
        data = self.handle.read(wanted)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _window(handle: BinaryIO, member: Member) -> AbstractContextManager[BinaryIO]:
    return io.BufferedReader(_Window(handle, _checked(member)))


class _Owned(io.BufferedReader):
    """A member of a tar that is opened for it, and closed with it."""

    def __init__(self, place: Place) -> None:
        self.tar = open(place.path, "rb")  # noqa: SIM115 - closed in close()
        super().__init__(_Window(self.tar, place))

    def close(self) -> None:
        super().close()
        self.tar.close()

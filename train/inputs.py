"""What a stage reads: digests of files, what changed since they were taken, and a store of digests by path.

A record of inputs, in done.json and in every checkpoint, is {"reads": {name: {"digest", "count", "files"}}, "stages":
{stage: run id}}. Names of reads are the settings that lead to them ("base", "data.path"); files are named relative to
that place, so a folder with the same content elsewhere is the same input.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgen.fields import check_fields, mapping, text
from train.files import digest_json, read_json, sha256, write_json

STORE = "digests.json"
LISTED = 1000  # files of one input that a record names one by one; of more, it has the digest of all
SETTLED = 2.0  # seconds after which a change to a file surely shows in its times
LARGE = 1 << 30  # bytes of a file that takes seconds to read, which is said
PART = (".json", ".safetensors", ".sft", ".txt", ".model", ".jinja")  # of a part of a release, what its reader may open
Record = dict[str, Any]


@dataclass(frozen=True)
class Read:
    """Files that a stage reads, named relative to `root`; a file that is itself the root has no name.

    A file that is not there is no input.
    """

    root: Path
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files if path.is_file())


def one_file(path: Path) -> Read:
    """One file, by its name."""
    return Read(path.parent, (path,))


def one_part(folder: Path) -> Read:
    """A part of a release, such as an autoencoder: its config, weights and vocabulary; not what lies in subfolders."""
    return Read(folder, tuple(part_files(folder)))


def part_files(folder: Path) -> list[Path]:
    """The files of a part of a release; none where there is no such folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(f for f in files if f.suffix in PART and f.name[0] != "." and f.is_file())


def tree(root: Path, without: Collection[str] = ()) -> Read:
    """Every file below a folder but hidden ones and the subfolders `without`."""
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f[0] != "." and not (Path(place) == root and f in without)]
        files += [Path(place) / name for name in names if name[0] != "."]
    return Read(root, tuple(sorted(files)))


class Digests:
    """sha256 of files, kept in FOLDER/digests.json: a file of the same size, times and inode is not read again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STORE
        self.known: dict[str, Any] = {}
        self.added = False
        if self.path.is_file():
            try:
                self.known = read_json(self.path)
            except ValueError:  # damaged: every file is read again
                self.known = {}

    def sha256(self, path: Path) -> str:
        """Hex digest of a file's bytes. Raises OSError when it cannot be read."""
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self.known.get(str(path.absolute()))
        if isinstance(known, list) and len(known) == 5 and known[:4] == state and isinstance(known[4], str):
            return known[4]
        if status.st_size > LARGE:
            print(f"taking the digest of {path}, {status.st_size / 1e9:.1f} GB", flush=True)
        digest = sha256(path)
        # A file that is younger may change again within the resolution of its times.
        if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED:
            self.known[str(path.absolute())] = [*state, digest]
            self.added = True
        return digest

    def save(self) -> None:
        """Write the store if it has grown."""
        if self.added:
            write_json(self.path, self.known)
            self.added = False


def identity(reads: Mapping[str, Read], digests: Digests) -> Record:
    """Name -> digest of its files, their number and, of at most LISTED, each one's sha256 by relative path.

    A name of which no file exists is left out.
    """
    record: Record = {}
    for name, read in reads.items():
        files = {_relative(path, read.root): digests.sha256(path) for path in read.files if path.is_file()}
        if files:
            record[name] = {"digest": digest_json(sorted(files.items())), "count": len(files)}
            if len(files) <= LISTED:
                record[name]["files"] = files
    return record


def check_record(record: Any) -> Record:
    """A record of inputs as read from a file; ValueError for what is none."""
    check_fields({"inputs": record}, {"inputs": mapping})
    check_fields(record, {"reads": mapping, "stages": mapping}, needed=("reads", "stages"))
    for name, entry in record["reads"].items():
        check_fields({name: entry}, {name: mapping})
        check_fields(entry, {"digest": text(100), "files": mapping}, needed=("digest",))
    return record


def changes(old: Record, new: Record, free: Collection[str] = ()) -> list[str]:
    """What differs between two records of inputs, a line each; inputs that either does not know are not compared.

    free: names of reads that may change.
    """
    lines = []
    for stage, run in old["stages"].items():
        now = new["stages"].get(stage)
        if run and now and run != now:
            lines.append(f"one of its inputs (stage {stage}) was made anew: it is run {now} now, {run} was read")
    for name, entry in old["reads"].items():
        other = new["reads"].get(name)
        if name not in free and other is not None and entry["digest"] != other["digest"]:
            lines.append(f"{name} has changed: {_changed_files(entry, other)}")
    return lines


def missing(old: Record, new: Record, free: Collection[str] = ()) -> list[str]:
    """Names of reads that were recorded and are not there any more."""
    return sorted(set(old["reads"]) - set(new["reads"]) - set(free))


def without_places(settings: Mapping[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """Settings with None for each place (a dotted name, such as data.path): its content is compared instead."""
    result = dict(settings)
    for place in places:
        head, dot, rest = place.partition(".")
        if head in result:
            value = result[head]
            result[head] = without_places(value, [rest]) if dot and isinstance(value, Mapping) else None
    return result


def _changed_files(old: Record, new: Record) -> str:
    if "files" not in old or "files" not in new:
        return f"{new['count']} files, before {old.get('count', '?')}, with another content"
    before, now = old["files"], new["files"]
    parts = []
    for words, names in (
        ("other content in", [name for name in now if name in before and now[name] != before[name]]),
        ("new", [name for name in now if name not in before]),
        ("gone", [name for name in before if name not in now]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            shown = ["the file" if name == "." else name for name in sorted(names)[:3]]
            parts.append(f"{words} {', '.join(shown)}{more}")
    return "; ".join(parts)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

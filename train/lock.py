"""One process a run folder: a lock that names its holder and ends with it, and what killed holders left swept away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

LOCK = ".dcgen-lock"
LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # what dcgen.files.replacing and train.files.write_folder write to


class InUse(RuntimeError):
    """Another process works in the folder; the message names it."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, or InUse that says who has it. The system frees it when the holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _take(file):
            raise InUse(
                f"{folder} is in use by another process ({_holder(file)}): two would write the same files. Wait for "
                "it, stop it, or name another output="
            )
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
        file.flush()
        yield
        file.truncate(0)


def sweep(folders: Iterable[Path]) -> list[Path]:
    """Remove what a killed process was writing, below these folders; only for who holds the lock."""
    removed = []
    for folder in folders:
        for place, names, files in os.walk(folder):
            for name in [name for name in (*names, *files) if LEFTOVER.fullmatch(name)]:
                path = Path(place) / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
            names[:] = [name for name in names if not LEFTOVER.fullmatch(name)]
    return removed


def sweep_files(folder: Path, names: Collection[str]) -> None:
    """Remove what a killed process was writing of files of these names, in this very folder."""
    for path in folder.glob(".*.tmp"):
        if LEFTOVER.fullmatch(path.name) and path.name[1:].rsplit(".", 2)[0] in names and path.is_file():
            path.unlink()


def _holder(file: IO[str]) -> str:
    """What the holder wrote about itself; it may be about to."""
    file.seek(0)
    try:
        holder = json.loads(file.read(1000))
        return f"host {holder['host']}, process {holder['pid']}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):
        return "it does not say which"


if os.name == "nt":  # pragma: no cover
    import msvcrt

    def _take(file: IO[str]) -> bool:
        """Lock a byte far behind the text, which stays readable."""
        file.seek(1 << 20)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True

else:
    import fcntl

    def _take(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks (some network ones): nothing can be held there
            return True
        return True

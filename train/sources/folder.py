"""Images in a folder tree, with captions in files beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dcgen.fields import shown
from train import captions, images
from train.samples import File, SampleError, files_under, printable, sample
from train.sources.base import Files, FileSource, Found

TABLE = "metadata.jsonl"


class FolderData(Files):
    """Images in a folder tree. The caption is the file of the same name beside an image that ends in .txt or .caption
    (text), a line of metadata.jsonl in its folder or one above (`file_name` and `caption` or `text`), or the .json of
    the same name (an object with `caption` or `text`): the first of these that is there."""

    type: Literal["folder"]


class FolderSource(FileSource):
    """Images in a folder tree."""

    def scan(self, root: Path) -> Iterator[Found]:
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is a file; data of type folder is a folder of images")
        files = files_under(root, self.skipped)
        beside: dict[str, dict[str, File]] = {}
        for file in files:
            if file.suffix in (*captions.SUFFIXES, ".json"):
                beside.setdefault(str(file.path.with_suffix("")), {}).setdefault(file.suffix, file)
            elif file.suffix in images.OTHER_SUFFIXES:
                self.skipped.add(f"images of kinds that are not read ({file.suffix})", file.name)
        listed = self._tables(files)
        for file in files:
            if file.suffix not in images.SUFFIXES:
                continue
            texts = beside.get(str(file.path.with_suffix("")), {})
            read = partial(self._captions, texts, listed.pop(str(file.path), None))
            yield Found(
                file.name, printable(str(file.path)), read, partial(self.open, file.path), file.path, file.stamp
            )
        for where, _ in listed.values():
            self.skipped.add(f"lines of {TABLE} whose image is not there", where)

    def open(self, place: Any) -> AbstractContextManager[BinaryIO]:
        return open(place, "rb")

    def _captions(self, texts: dict[str, File], row: tuple[str, dict[str, Any]] | None) -> list[str]:
        """Of a sample, from the files beside it and its line in a table."""
        for suffix in captions.SUFFIXES:
            if suffix in texts:
                with sample(printable(str(texts[suffix].path))), open(texts[suffix].path, "rb") as file:
                    return self.text(file)
        if row is not None:
            where, values = row
            with sample(where):
                return captions.captions_of_object(values)
        if ".json" in texts:
            where = printable(str(texts[".json"].path))
            with sample(where), open(texts[".json"].path, "rb") as file:
                return captions.captions_of_json(captions.read_bounded(file), where)
        return []

    def _tables(self, files: list[File]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Path of an image -> (where its line is, the line), of all tables; of two lines for one image the first."""
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for table in files:
            if table.path.name.lower() != TABLE:
                continue
            for number, row in captions.rows(table.path):
                where = f"{printable(str(table.path))}, line {number}"
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise SampleError(f"{where}: file_name is {shown(name)}, expected the name of an image")
                path = os.path.normpath(table.path.parent / name)
                if path in found:
                    self.skipped.add(f"further lines of {TABLE} for one image", f"{name} in line {number}")
                else:
                    found[path] = where, {field: row.get(field) for field in captions.FIELDS}
        return found

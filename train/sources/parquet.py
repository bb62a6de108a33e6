"""Parquet files of Hugging Face image data sets. Needs pyarrow."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from train import captions
from train.samples import File, files_under, printable, sample
from train.sources.base import Files, FileSource, Found

STEP_BYTES = 1 << 28  # that are unpacked at a time, as far as one row allows
KEPT_BYTES = 1 << 30  # of images that stay unpacked between calls
# What a file may unfold to: a dictionary of one value of a megabyte, used a million times, is a file of a megabyte.
UNFOLD_BYTES, UNFOLD_TIMES = 1 << 30, 256


class ParquetData(Files):
    """Hugging Face parquet files with an image column ({"bytes": ...} or bytes) and a caption column.

    Captions are text, lists of texts or whole numbers. An image that is given by its path alone is not read.
    """

    type: Literal["parquet"]
    image_column: str = "image"
    caption_column: str = "text"


class Place(NamedTuple):
    """A row: its file, row group, and number in that."""

    path: Path
    group: int
    row: int


class ParquetSource(FileSource):
    """Parquet files, one after the other. No file stays open; the row groups used last stay unpacked."""

    config: ParquetData

    def scan(self, root: Path) -> Iterator[Found]:
        self.group_bytes: dict[tuple[Path, int], int] = {}
        self.kept: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        for file in files_under(root, self.skipped):
            if file.suffix == ".parquet" or file.path == root:
                yield from self._scan_file(file)

    def open(self, place: Any) -> AbstractContextManager[BinaryIO]:
        return io.BytesIO(_bytes_of(self._column(place)[place.row].as_py()) or b"")

    def _scan_file(self, file: File) -> Iterator[Found]:
        rows, number = self._rows(file), -1
        while True:
            with sample(printable(str(file.path))):
                row = next(rows, None)
            if row is None:
                return
            number += 1
            group, place, image, caption = row
            where = f"{printable(str(file.path))}, row {number}"
            try:
                with sample(where):
                    data = _bytes_of(image.as_py())
                opened = partial(io.BytesIO, data) if data else None
            except ValueError as error:
                opened = partial(_refuse, error)
            yield Found(
                f"{file.name}:{number}",
                where,
                lambda value=caption: captions.captions_of(value.as_py()),  # type: ignore[misc]
                opened,
                Place(file.path, group, place),
                file.stamp,
            )

    def _rows(self, file: File) -> Iterator[tuple[int, int, Any, Any]]:
        """(row group, row in it, image, caption) of every row of a file, unpacked a few at a time."""
        with _opened(file.path) as table:
            columns = self._check(table, file)
            unfolded, most = 0, max(UNFOLD_BYTES, UNFOLD_TIMES * file.size)
            for group in range(table.num_row_groups):
                row, key = 0, (file.path, group)
                self.group_bytes[key] = 0
                for batch in self._batches(table, group, columns):
                    unfolded += batch.nbytes
                    self.group_bytes[key] += batch.nbytes
                    if unfolded > most:
                        raise ValueError(f"{file.size} bytes unfold to more than {most}; this is no set of images")
                    pictures = batch.column(self.config.image_column)
                    texts = batch.column(self.config.caption_column)
                    for index in range(batch.num_rows):
                        yield group, row + index, pictures[index], texts[index]
                    row += batch.num_rows
                if row != table.metadata.row_group(group).num_rows:
                    raise ValueError(f"row group {group} has {row} rows, its header says otherwise: damaged")

    def _check(self, table: Any, file: File) -> list[str]:
        """The columns to read; ValueError where they are not there or of other types."""
        schema = table.schema_arrow
        for column in (self.config.image_column, self.config.caption_column):
            if schema.names.count(column) != 1:
                many = "no" if column not in schema.names else "more than one"
                raise ValueError(f"{file.path} has {many} column {column!r}; it has {', '.join(schema.names)[:500]}")
        if table.metadata.num_rows > file.size:
            raise ValueError(f"{table.metadata.num_rows} rows in {file.size} bytes; this is no set of images")
        _check_caption(self.config.caption_column, schema.field(self.config.caption_column).type)
        image = schema.field(self.config.image_column).type
        return [self._image_leaf(image), self.config.caption_column]

    def _image_leaf(self, kind: Any) -> str:
        """The column of the images' bytes; in a struct, its field `bytes`."""
        from pyarrow import types

        name = self.config.image_column
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            name, kind = f"{name}.bytes", kind.field("bytes").type
        if not (_is_plain(kind, "binary") or types.is_null(kind)):
            raise ValueError(f"column {name!r} is {str(kind)[:200]}, expected bytes or a struct with a field `bytes`")
        return name

    def _batches(self, table: Any, group: int, columns: list[str]) -> Iterator[Any]:
        """The rows of a group, so many at a time that they take at most STEP_BYTES, or one row what it takes.

        How much a group takes, a dictionary's values once, is asked of the group: pyarrow ends the process, and no
        exception can be caught, where the record of a single column is damaged and asked for.
        """
        step = max(1, min(64, STEP_BYTES // max(table.metadata.row_group(group).total_byte_size, 1)))
        return table.iter_batches(batch_size=step, row_groups=[group], columns=columns, use_threads=False)

    def _column(self, place: Place) -> Any:
        """Something to index with a row of the place's group: the unpacked column, or just that row of it."""
        key = place.path, place.group
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        with _opened(place.path) as table:
            leaf = [self._image_leaf(table.schema_arrow.field(self.config.image_column).type)]
            if self.group_bytes[key] > KEPT_BYTES:
                return _one_row(self._batches(table, place.group, leaf), place.row)
            while self.kept and self.group_bytes[key] + sum(self.group_bytes[k] for k in self.kept) > KEPT_BYTES:
                self.kept.popitem(last=False)
            self.kept[key] = table.read_row_group(place.group, columns=leaf, use_threads=False).column(0)
        return self.kept[key]


def _one_row(batches: Iterator[Any], row: int) -> dict[int, Any]:
    begin = 0
    for batch in batches:
        if row < begin + batch.num_rows:
            return {row: batch.column(0)[row - begin]}
        begin += batch.num_rows
    raise ValueError(f"row {row} is not there any more")


def _opened(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _bytes_of(value: Any) -> bytes | None:
    """The image in a cell; None or b"" where there is none."""
    return value.get("bytes") if isinstance(value, dict) else value


def _refuse(error: ValueError) -> Any:
    raise error


def _is_plain(kind: Any, name: str) -> bool:
    """Whether an Arrow type is `name` (binary or string) in any layout, also as a dictionary's values."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in {name, f"large_{name}", f"{name}_view"} or (
        name == "binary" and types.is_fixed_size_binary(kind)
    )


def _check_caption(name: str, kind: Any) -> None:
    from pyarrow import types

    item = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    if not (_is_plain(item, "string") or types.is_integer(item) or types.is_null(item)):
        raise ValueError(f"column {name!r} is {str(kind)[:200]}, expected text, lists of texts or whole numbers")

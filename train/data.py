"""Text-image data sets: which formats there are, and how a recipe's `data` is opened.

What is read is untrusted: `train.images` decodes, `train.captions` reads text, `train.samples` names what went wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from train import captions, images
from train.images import fit
from train.samples import SampleError, Skipped, files_under, printable
from train.sources.base import Files, FileSource, Source, bucket_sizes, nearest_bucket
from train.sources.folder import FolderData, FolderSource
from train.sources.parquet import ParquetData, ParquetSource
from train.sources.toy import ToyClassData, ToyData, ToySource
from train.sources.webdataset import TarData, TarSource

__all__ = [
    "DataConfig",
    "FolderData",
    "ParquetData",
    "SampleError",
    "Source",
    "TarData",
    "ToyClassData",
    "ToyData",
    "bucket_sizes",
    "data_files",
    "fit",
    "nearest_bucket",
    "open_source",
]

DataConfig = Annotated[ToyData | ToyClassData | FolderData | TarData | ParquetData, Field(discriminator="type")]
KINDS: dict[type[Files], type[FileSource]] = {
    FolderData: FolderSource,
    TarData: TarSource,
    ParquetData: ParquetSource,
}
BESIDE = (*captions.SUFFIXES, ".json", ".jsonl")
SUFFIXES: dict[type[Any], tuple[str, ...]] = {
    ToyData: (*images.SUFFIXES, ".json"),
    ToyClassData: (*images.SUFFIXES, ".json"),
    FolderData: (*images.SUFFIXES, *BESIDE),
    TarData: (".tar",),
    ParquetData: (".parquet",),
}
"""Of the files that a data set of a kind is read from."""
EXPECTED = {
    "folder": f"Expected {', '.join(images.SUFFIXES)} files with 0001.txt beside 0001.png, or a metadata.jsonl",
    "webdataset": "Expected .tar files with 0001.txt beside 0001.png in them",
    "parquet": "Expected .parquet files with an image column and a caption column",
}


def open_source(config: ToyData | FolderData | TarData | ParquetData, path: Path) -> Source:
    """The source a recipe describes, at `path`. What is left out is said on stderr, by the first rank.

    A missing path is a FileNotFoundError, an empty one a ValueError, a damaged sample or file a SampleError.
    """
    config = config.model_copy(update={"path": str(path)})
    if isinstance(config, ToyData):
        return ToySource(config)
    if not path.exists():
        raise FileNotFoundError(
            f"data path {path} does not exist; set data.path to where your images are ({config.type})"
        )
    source: Any = KINDS[type(config)](config)
    skipped = source.skipped.lines()
    if not len(source):
        found = "".join(f"; {line}" for line in skipped)
        raise ValueError(f"data path {path} holds no captioned image ({config.type}){found}. {EXPECTED[config.type]}")
    if skipped and os.environ.get("RANK", "0") == "0":
        print("\n  ".join([f"{printable(str(path))}: {len(source)} samples", *skipped]), file=sys.stderr, flush=True)
    return source


def data_files(config: ToyData | FolderData | TarData | ParquetData, path: Path) -> list[Path]:
    """The files that images and captions come from, for telling whether they have changed; opens none."""
    if not path.exists():
        return []
    suffixes = SUFFIXES[type(config)]
    return [file.path for file in files_under(path, Skipped()) if file.suffix in suffixes or file.path == path]

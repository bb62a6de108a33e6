"""The text side of a release: its tokenizers and encoders, by classes that a family lists, and what tells it apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dcgen.fields import items, text, words
from dcgen.files import naming, weight_files
from dcgen.folder import part as release_part
from train.files import read_json, sha256
from train.inputs import part_files

# A family's text_parts say which transformers classes a release may name for a part. None of them runs code out of the
# folder, as an Auto class could. These two are the ones of any tokenizer.json, by transformers 4 and 5.
ANY_TOKENIZER = ("PreTrainedTokenizerFast", "TokenizersBackend")
Parts = Mapping[str, tuple[str, ...]]


def text_identity(
    base: Path, parts: Parts, tokens: int | None = None, digest: Callable[[Path], str] = sha256
) -> dict[str, Any]:
    """What decides the embeddings of text of that length: part of a cache's config_hash."""
    files = [file for part in parts if (base / part).is_dir() for file in _deciding_files(base / part)]
    return {"tokens": tokens, "files": {file.relative_to(base).as_posix(): digest(file) for file in files}}


def text_files(base: Path, parts: Parts) -> list[Path]:
    """The files of a release's text side that are there: configs, vocabularies, weights."""
    return [file for name in parts for file in part_files(base / name)]


def check_text(base: Path, parts: Parts) -> None:
    """An error that names the file unless a release's text side can be loaded as far as its files tell."""
    for part, classes in parts.items():
        _part_class(base, part, classes)
        release_part(base, part)


def load_part(base: Path, part: str, classes: tuple[str, ...], dtype: torch.dtype | None = None) -> Any:
    """A tokenizer, or with a dtype a text encoder, by the class that model_index.json names for it."""
    import transformers

    cls, folder = _part_class(base, part, classes), release_part(base, part)
    if dtype is None:
        return cls.from_pretrained(folder, trust_remote_code=False)
    encoder, loaded = cls.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} finds {len(loaded['missing_keys'])} weights of "
            f"{cls.__name__} missing there, {sorted(loaded['missing_keys'])[0]} among them, and would take random "
            "ones. A newer transformers may have written the folder: install that, or download the release again."
        )
    return encoder.eval().requires_grad_(False)


def _part_class(base: Path, part: str, classes: tuple[str, ...]) -> Any:
    """The transformers class that model_index.json names for a part."""
    import transformers

    index = base / "model_index.json"
    named = read_json(index).get(part)
    if named is None:
        raise ValueError(f"{index} names no {part}; this release is incomplete for text encoding")
    with naming(index):
        items(text(100), 2, 2)(part, named)
        words(*classes)(f"class of {part}", named[1])
        cls = getattr(transformers, named[1], None)
        if cls is None:
            raise ValueError(f"{part} is a {named[1]}, which this transformers does not have")
    return cls


def _deciding_files(folder: Path) -> list[Path]:
    """All files of a tokenizer, the weights of an encoder."""
    if folder.name.startswith("tokenizer"):
        return sorted(file for file in folder.glob("*") if file.is_file())
    return weight_files(folder)

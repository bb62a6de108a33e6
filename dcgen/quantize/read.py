"""Reads quantized files back: the same model with its weights expanded."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..fields import shown
from ..files import Entry
from ..jsons import parse_object
from ..release import Model, model_of
from ..tensors import Rows, Tensors
from .formats import FORMATS, NOTE, Format, Stored

_NOTE = f".{NOTE}"


def open_quantized(path: str | os.PathLike[str]) -> Model:
    """A file that quantize_model wrote, as a model with float32 weights that are expanded when they are read.

    ValueError when it has a format that dcgen.quantize does not write.
    """
    path = Path(path)
    file = Tensors.open(path)
    layers = {key.removesuffix(_NOTE): key for key in file.entries if key.endswith(_NOTE)}
    if not layers:
        raise ValueError(f"{path}: no layer of this file is quantized for ComfyUI (none has {NOTE})")
    entries: dict[str, Entry] = {}
    readers: dict[str, Rows] = {}
    for key, entry in file.entries.items():
        layer, _, part = key.rpartition(".")
        if layer not in layers or part == "bias":
            entries[key], readers[key] = entry, partial(file.get, key)
    for layer in layers:
        fmt, shape = _stored(file, layer)
        key = f"{layer}.weight"
        entries[key] = Entry(key, torch.float32, shape)
        readers[key] = partial(_expanded, file, layer, fmt, shape)
    return model_of(Tensors(path, entries, file.metadata, readers, {}))


def _stored(file: Tensors, layer: str) -> tuple[Format, tuple[int, int]]:
    """Format and shape of a layer, by its JSON and the shapes of its tensors; ValueError when it is none of ours."""
    note = f"{layer}{_NOTE}"
    fields = parse_object(file.get(note).numpy().tobytes(), f"{file.path}: {note}")
    weight, bias = file.entries.get(f"{layer}.weight"), file.entries.get(f"{layer}.bias")
    for fmt in FORMATS.values():
        if fields.get("format") != fmt.core or weight is None or len(weight.shape) != 2:
            continue
        rows = weight.shape[0] if bias is None else bias.shape[0]  # rows of some formats are padded
        shape = rows, weight.shape[1] * weight.dtype.itemsize * 8 // fmt.bits
        if all(file.entries.get(entry.name) == entry for entry in Stored(fmt).entries(layer, shape)[:-1]):
            return fmt, shape
    raise ValueError(f"{file.path}: {layer} is stored as {shown(fields)}, which dcgen.quantize does not write")


def _expanded(
    file: Tensors, layer: str, fmt: Format, shape: tuple[int, int], start: int = 0, stop: int | None = None
) -> Tensor:
    names = [entry.name for entry in fmt.entries(shape)]
    return fmt.dequantize({name: file.get(f"{layer}.{name}") for name in names}, shape)[start:stop]

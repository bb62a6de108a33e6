"""Files for nunchaku: a base, or DC-Gen's merged blocks in its shape (dcgen.merge.split), in SVDQuant's 4 bits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones import BACKBONES, Backbone
from ..backbones.base import NunchakuLayer
from ..fields import check_fields, shown
from ..files import Entry, is_finite, naming, write_stream
from ..jsons import parse_object
from ..release import Model, model_metadata, model_of
from ..tensors import Rows, Tensors
from .svdquant import DTYPE, SvdQuant, dequantize_modulation, modulation_entries, quantize_modulation, smoothing
from .write import QUANTIZATION_KEY, Progress, check_base_latent

QUANTIZATION_CONFIG = "quantization_config"  # of nunchaku's files, as JSON in the metadata
FP4 = "fp4_e2m1_all"


@dataclass(frozen=True)
class Packed:
    """A layer of nunchaku's network: `block` is the path of its block, `shapes` are those of its parts' weights."""

    block: str
    layer: NunchakuLayer
    shapes: tuple[tuple[int, int], ...]
    columns: slice

    @property
    def name(self) -> str:
        return f"{self.block}.{self.layer.name}"

    @property
    def parts(self) -> list[str]:
        """Its diffusers layers."""
        return [f"{self.block}.{part}" for part in self.layer.parts]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the joined weight."""
        return sum(rows for rows, _ in self.shapes), len(range(*self.columns.indices(self.shapes[0][1])))

    def entries(self, fmt: SvdQuant) -> list[Entry]:
        """Its tensors, by full name."""
        entries = modulation_entries(self.shape) if self.layer.splits else fmt.entries(self.shape, len(self.parts) > 1)
        return [Entry(f"{self.name}.{entry.name}", entry.dtype, entry.shape) for entry in entries]


def packed_layers(backbone: Backbone, base: Mapping[str, Any]) -> list[Packed]:
    """All layers of nunchaku's blocks for a base with this signature."""
    found, width = [], base["width"]
    for kind, layers in backbone.nunchaku.items():
        field, path, _ = backbone.stacks[kind]
        shapes = backbone.layers(base)[kind]
        for i in range(base[field]):
            for layer in layers:
                first, last = layer.columns
                columns = slice(first * width, None if last is None else last * width)
                sizes = tuple((shapes[part][0], shapes[part][1]) for part in layer.parts)
                found.append(Packed(f"{path}.{i}", layer, sizes, columns))
    return found


def write_nunchaku(
    model: Model,
    out: str | os.PathLike[str],
    fmt: SvdQuant,
    *,
    activations: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write the model with the blocks in nunchaku's layout and everything else in bfloat16, by diffusers names.

    activations: the largest magnitude of each input of the layers (K,), by diffusers path, for smoothing; without
    them the inputs are not smoothed. ValueError, before work begins, as for quantize_model.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the result is a .safetensors file; give it that ending")
    layers = check_nunchaku(model, fmt)
    _check_activations(activations or {}, layers)
    model.check_values()
    others = _others(model, layers)
    entries = [entry for packed in layers for entry in packed.entries(fmt)]
    entries += [Entry(name, DTYPE, model.entries[key].shape) for key, name in others.items()]
    stream = _tensors(model, fmt, layers, others, activations or {}, torch.device(device), progress)
    write_stream(out, entries, stream, _metadata(model, out.stem, fmt, activations is not None))
    return out


def check_nunchaku(model: Model, fmt: SvdQuant) -> list[Packed]:
    """The layers of nunchaku's network; ValueError when it cannot run the model or store a layer of it."""
    path = model.tensors.path
    if not model.backbone.nunchaku:
        raise ValueError(f"{path}: nunchaku runs no {model.backbone.title} model")
    check_base_latent(model, "nunchaku's loaders")
    layers = packed_layers(model.backbone, model.signature)
    for packed in layers:
        try:
            fmt.check(packed.shape)
        except ValueError as error:
            raise ValueError(f"{path}: {fmt.name} cannot store {packed.name}: {error}") from error
    return layers


def _check_activations(activations: Mapping[str, Tensor], layers: list[Packed]) -> None:
    """ValueError unless each layer that is smoothed has the right number of finite values."""
    if not activations:
        return
    for packed in layers:
        found = activations.get(packed.parts[0])
        wanted = (packed.shapes[0][1],)
        if not packed.layer.splits and (found is None or tuple(found.shape) != wanted or not is_finite(found)):
            shape = "no" if found is None else f"{tuple(found.shape)}"
            raise ValueError(f"activations: {packed.parts[0]} has {shape} values, expected {wanted}, all finite")


def _others(model: Model, layers: list[Packed]) -> dict[str, str]:
    """Diffusers name -> name in the file of all tensors outside of the packed layers; norms lose the part `attn.`."""
    packed = {f"{part}{suffix}" for layer in layers for part in layer.parts for suffix in (".weight", ".bias")}
    blocks = tuple(f"{path}." for _, path, _ in model.backbone.stacks.values())
    return {
        key: key.replace(".attn.", ".") if key.startswith(blocks) else key for key in model.entries if key not in packed
    }


def _tensors(
    model: Model,
    fmt: SvdQuant,
    layers: list[Packed],
    others: Mapping[str, str],
    activations: Mapping[str, Tensor],
    device: torch.device,
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    for number, packed in enumerate(layers):
        if progress:
            progress(number, len(layers), packed.name)
        weights = [model.get(f"{part}.weight")[:, packed.columns].to(device) for part in packed.parts]
        bias = torch.cat([model.get(f"{part}.bias") for part in packed.parts]).to(device)
        if not all(map(is_finite, weights)):
            raise ValueError(f"{model.tensors.path}: values of {packed.name} are infinite after the merge")
        if packed.layer.splits:
            stored = quantize_modulation(weights[0], bias, packed.layer.splits)
        else:
            largest = activations.get(packed.parts[0])
            smooth = None if largest is None else smoothing(largest[packed.columns].to(device), weights)
            own = bias if packed.layer.bias else None
            stored = fmt.quantize(weights, own, smooth=smooth, shifted=packed.layer.shifted)
        yield from ((f"{packed.name}.{name}", tensor) for name, tensor in stored.items())
    for key, name in others.items():
        yield name, model.get(key).to(DTYPE)


def _metadata(model: Model, title: str, fmt: SvdQuant, smoothed: bool) -> dict[str, str]:
    numbers = {"dtype": FP4 if fmt.fp4 else "int4", "group_size": fmt.group}
    weight = {**numbers, "scale_dtype": [None, "fp8_e4m3_nan"] if fmt.fp4 else None}
    activation = {**numbers, "scale_dtype": "fp8_e4m3_nan" if fmt.fp4 else None}
    layout = {"method": "svdquant", "weight": weight, "activation": activation, "rank": fmt.rank}
    done = {"format": fmt.name, "rank": fmt.rank, "smoothed": smoothed, "source": model.tensors.path.name}
    return {
        **model_metadata(model, title),
        "model_class": model.backbone.nunchaku_class,
        "config": json.dumps({"_class_name": model.backbone.diffusers_class, **model.config}),
        "comfy_config": json.dumps(model.backbone.comfy_config(model.config)),
        QUANTIZATION_CONFIG: json.dumps(layout),
        QUANTIZATION_KEY: json.dumps({**done, "engine": f"torch {torch.__version__}"}),
    }


# Reading back -----------------------------------------------------------------------------------------------------


def is_nunchaku(path: str | os.PathLike[str]) -> bool:
    """Whether a file has nunchaku's layout."""
    path = Path(path)
    return path.is_file() and QUANTIZATION_CONFIG in Tensors.open(path).metadata


def open_nunchaku(path: str | os.PathLike[str]) -> Model:
    """A file of nunchaku's, as a model with float32 weights that are expanded when they are read."""
    path = Path(path)
    file = Tensors.open(path)
    config = parse_object(file.metadata.get("config", "{}"), f"{path}: config")
    known = [backbone for backbone in BACKBONES.values() if backbone.nunchaku]
    backbone = next((one for one in known if one.diffusers_class == config.get("_class_name")), None)
    if backbone is None:
        raise ValueError(f"{path}: class {shown(config.get('_class_name'))} is none that nunchaku runs")
    with naming(path):
        check_fields(config, backbone.fields, backbone.needed_fields)
    base = backbone.base_signature(config)
    fmt = _format_of(file)
    entries: dict[str, Entry] = {}
    readers: dict[str, Rows] = {}
    layers = packed_layers(backbone, base)
    for packed in layers:
        for entry in packed.entries(fmt):
            if file.entries.get(entry.name) != entry:
                raise ValueError(f"{path}: {entry.name} is {file.entries.get(entry.name)}, expected {entry}")
    pieces: dict[str, list[Packed]] = {}
    for packed in layers:
        for part in packed.parts:
            pieces.setdefault(part, []).append(packed)
    for part, of in pieces.items():
        shape = of[0].shapes[of[0].parts.index(part)]
        for name, size in ((f"{part}.weight", shape), (f"{part}.bias", shape[:1])):
            entries[name] = Entry(name, torch.float32, size)
            readers[name] = partial(_expanded, file, fmt, of, name)
    blocks = tuple(f"{path}." for _, path, _ in backbone.stacks.values())
    taken = tuple(f"{packed.name}." for packed in layers)
    for key, entry in file.entries.items():
        if not key.startswith(taken):
            block, norm = key.rsplit(".", 2)[0], ".".join(key.rsplit(".", 2)[1:])
            name = f"{block}.attn.{norm}" if key.startswith(blocks) else key
            entries[name], readers[name] = Entry(name, entry.dtype, entry.shape), partial(file.get, key)
    return model_of(Tensors(path, entries, file.metadata, readers, {}))


def _format_of(file: Tensors) -> SvdQuant:
    """The format that the metadata states; ValueError when it is none of nunchaku's."""
    layout = parse_object(file.metadata.get(QUANTIZATION_CONFIG, "{}"), f"{file.path}: {QUANTIZATION_CONFIG}")
    weight, rank = layout.get("weight"), layout.get("rank")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    if dtype not in (FP4, "int4") or not isinstance(rank, int):
        raise ValueError(
            f"{file.path}: {QUANTIZATION_CONFIG} is {shown(layout)}, not one of SVDQuant in nunchaku's files"
        )
    return SvdQuant(dtype == FP4, rank)


def _expanded(
    file: Tensors, fmt: SvdQuant, pieces: list[Packed], name: str, start: int = 0, stop: int | None = None
) -> Tensor:
    """Weight or bias of a diffusers layer from the layers of the file that hold it."""
    part, _, kind = name.rpartition(".")
    found = []
    for packed in pieces:
        position = packed.parts.index(part)
        first = sum(rows for rows, _ in packed.shapes[:position])
        rows = slice(first, first + packed.shapes[position][0])
        names = [entry.name.rpartition(".")[2] for entry in packed.entries(fmt)]
        stored = {key: file.get(f"{packed.name}.{key}") for key in names}
        if packed.layer.splits:
            values = dequantize_modulation(stored, packed.layer.splits)[kind == "bias"]
        elif kind == "weight":
            values = fmt.dequantize(stored, packed.shape)
        else:
            values = fmt.bias(stored, packed.shape, packed.layer.shifted)
        found.append(values[rows])
    whole = torch.cat(found, dim=1) if kind == "weight" else torch.stack(found).sum(0)
    return whole[start:stop]

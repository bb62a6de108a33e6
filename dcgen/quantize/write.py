"""Writes a quantized model, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert import open_as
from ..files import is_finite, write_stream
from ..folder import TRANSFORMER
from ..kinds import is_quantised
from ..merge import MergedModel
from ..release import Model, model_metadata
from ..tensors import Tensors
from . import kitchen
from .formats import NOTE, Format, Parts
from .plan import Unit, counted, plan

QUANTIZATION_KEY = "dcgen.quantization"
UNQUANTIZED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# (number of the tensor, number of tensors, its name)
Progress = Callable[[int, int, str], None]


def open_source(path: str | os.PathLike[str], latent: str | None = None, fields: Sequence[str] = ()) -> Model:
    """The model to quantize, as convert.open_as; ValueError, too, when it is quantized already."""
    path = Path(path)
    advice = "take the file that it was made from: quantizing twice adds both errors"
    if path.suffix == ".gguf":
        raise ValueError(f"{path}: a GGUF file is quantized already; {advice}")
    tensors = Tensors.open(path / TRANSFORMER if (path / TRANSFORMER).is_dir() else path)
    narrow = [entry for entry in tensors.entries.values() if entry.dtype not in UNQUANTIZED and len(entry.shape) > 1]
    if is_quantised(tensors.entries) or narrow:
        example = f" ({narrow[0].name} is {narrow[0].dtype})" if narrow else ""
        raise ValueError(f"{path}: this model is quantized already{example}; {advice}")
    return open_as(path, latent, fields)


def quantize_model(
    model: Model,
    out: str | os.PathLike[str],
    fmt: Format,
    *,
    keep: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write the model with the layers of its blocks in `fmt`, by the names of ComfyUI's network.

    keep: as in plan(). Nothing is written unless all is. ValueError, before any layer is quantized, when a layer does
    not fit or a value is NaN or infinite.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the result is a .safetensors file; give it that ending")
    units = checked_plan(model, fmt, keep)
    metadata = {**model_metadata(model, out.stem), QUANTIZATION_KEY: json.dumps(description(model, fmt, units, keep))}
    written = [entry for unit in units for entry in unit.written]
    write_stream(out, written, _tensors(model, units, torch.device(device), progress), metadata)
    return out


def checked_plan(model: Model, fmt: Format, keep: Sequence[str]) -> list[Unit]:
    """As plan(); ValueError, too, when a value of the model is NaN or infinite."""
    units = plan(model, fmt, keep)
    model.check_values()
    return units


def check_base_latent(model: Model, loaders: str) -> None:
    """ValueError unless the model is on the latent of the family's base, the only one that these loaders know."""
    factor = model.backbone.base_spatial_factor
    if model.latent is not None and model.latent.spatial_factor != factor:
        raise ValueError(
            f"{model.tensors.path} is on an f{model.latent.spatial_factor} latent; {loaders} know only the base's, "
            f"f{factor}. Give the base as MODEL, with --adapter and --split: the blocks become that file, the embedder "
            "and head an adapter for Apply DC-Gen"
        )


def description(model: Model, fmt: Format, units: Sequence[Unit], keep: Sequence[str] = ()) -> dict[str, Any]:
    """What was done, for the metadata of the file."""
    source = model.tensors.path.name
    done: dict[str, Any] = {"format": fmt.name, "layers": counted(units), "source": source, "engine": engine(fmt)}
    if keep:
        done["keep"] = list(keep)
    if isinstance(model, MergedModel):
        title = model.adapter.metadata.get("modelspec.title", "an adapter without title")
        done |= {"adapter": title, "strength": model.strength}
    return done


def engine(fmt: Format) -> str:
    """What computes the format: comfy-kitchen where it is installed and knows it, else torch."""
    return f"comfy-kitchen {kitchen.version()}" if kitchen.knows(fmt) else f"torch {torch.__version__}"


def quantized(fmt: Format, weight: Tensor) -> Parts:
    """The tensors of a weight (N,K) in a format, by the engine for it."""
    return kitchen.quantize(fmt, weight) if kitchen.knows(fmt) else fmt.quantize(weight)


def finite(unit: Unit, model: Model) -> Tensor:
    """The tensor; ValueError when a value is infinite: a sum of base and adapter can leave the range of float16."""
    tensor = unit.read()
    if not is_finite(tensor):
        raise ValueError(f"{model.tensors.path}: values of {unit.entry.name} are infinite after the merge")
    return tensor


def _tensors(
    model: Model, units: Sequence[Unit], device: torch.device, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    for number, unit in enumerate(units):
        if progress:
            progress(number, len(units), unit.entry.name)
        tensor = finite(unit, model)
        if unit.stored is None:
            yield unit.entry.name, tensor
            continue
        weight = tensor.reshape(unit.matrix).to(device)
        del tensor
        for name, part in quantized(unit.stored.format, weight).items():
            yield f"{unit.layer}.{name}", part
        yield f"{unit.layer}.{NOTE}", unit.stored.format.note(unit.matrix, unit.stored.exact)

"""Loads one file with core's quantized layers (comfy_quant, _quantization_metadata, scaled fp8) as a MODEL."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.quant_ops
import comfy.utils
import comfyui_version
import torch
from torch import Tensor

from ...dcgen.backbones import Backbone
from ...dcgen.jsons import parse_object
from ...dcgen.latent import METADATA_KEY, LatentSpace
from ...dcgen.release import CONFIG_KEY, SCHEDULE_KEY
from ...dcgen.schedule import Schedule
from ...dcgen.tensors import Tensors
from .families import FAMILIES
from .family import Family
from .loader import Weights, build, info_for
from .loading import by_layer

# Where a file states the formats of its layers: in a tensor per layer, or in the metadata.
FORMAT_SUFFIX, FORMAT_METADATA = ".comfy_quant", "_quantization_metadata"
QUANTIZED = (FORMAT_SUFFIX, ".weight_scale", ".scale_weight")
# Formats with two values per byte, along the inputs. All others but GROUPED store one value per element.
HALVED = ("nvfp4", "convrot_w4a4")
# The format with 4 or 6 bits per value, and a scale for each group of inputs.
GROUPED, GROUP_SCALES, GROUP_SIZE = "asym_w4a8_int8", "weight_s_rel", 16
# The first ComfyUI that was found to read a format; for the message only.
SINCE = {
    "mxfp8": "0.33.0",
    "int8_tensorwise": "0.33.0",
    "convrot_w4a4": "0.33.0",
    "asym_w4a8_int8": "0.33.0",
}


def quantized_file(tensors: Tensors) -> Path | None:
    """The file of an opened network if that is one file with core's quantized layers; else None."""
    files = {file for file, _ in tensors.places.values()}
    quantized = FORMAT_METADATA in tensors.metadata or any(key.endswith(QUANTIZED) for key in tensors.entries)
    return files.pop() if quantized and len(files) == 1 else None


def load_quantized(
    path: Path, space: LatentSpace | None, options: Mapping[str, Any], disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL that runs on core's mixed-precision operations, from one file with the key names of core's network.

    space: the latent space, if the file does not name it. ValueError when it is not known, when the keys fit no
    family, or when this ComfyUI lacks a format.
    """
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    family = _family(tensors, path)
    backbone = family.backbone
    metadata = _bare_metadata(metadata or {}, backbone)
    tensors, metadata = comfy.utils.convert_old_quants(dict(backbone.bare_keys(tensors)), "", metadata=metadata)
    formats = _layer_formats(tensors)
    _check_formats(formats, path)
    _check_bits(tensors, formats, path)
    logical = _logical(tensors, formats)
    config = (
        parse_object(metadata[CONFIG_KEY], f"{path}: {CONFIG_KEY}")
        if CONFIG_KEY in metadata
        else backbone.detect(logical)
    )
    space = LatentSpace.from_metadata(metadata) if METADATA_KEY in metadata else space
    if space is None:
        raise ValueError(f"{path} does not say which autoencoder its latents come from. Choose it in `autoencoder`.")
    stored = metadata.get(SCHEDULE_KEY)
    schedule = backbone.default_schedule(space, config)
    if stored:
        schedule = Schedule.parse(parse_object(stored, f"{path}: {SCHEDULE_KEY}"))
    info = info_for(family, space, backbone.patch_size(config, space, str(path)), schedule, config)
    # The format tensors stay among the shapes: core chooses its operations by them.
    shapes = {**logical, **{key: value for key, value in tensors.items() if key.endswith(FORMAT_SUFFIX)}}
    return build(family, Weights(path, shapes, lambda _: _parts(tensors)), info, options, disable_dynamic)


def _family(tensors: Mapping[str, Tensor], path: Path) -> Family:
    """The family whose network has these keys; ValueError when there is none."""
    options = []
    for family in FAMILIES.values():
        backbone = family.backbone
        keys = backbone.bare_keys(tensors)
        if backbone.matches(keys) and backbone.is_original(keys) is family.original_names:
            return family
        signature = backbone.original_signature if family.original_names else backbone.diffusers_signature
        naming = "original" if family.original_names else "diffusers"
        options.append(f"a {backbone.title} with the {naming} key names ({signature[0]} ...)")
    raise ValueError(f"{path}: a quantized model must be {' or '.join(options)}.")


def _parts(tensors: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    return ({name: tensors.pop(name) for name in names} for names in by_layer(list(tensors)))


def _bare_metadata(metadata: dict[str, str], backbone: Backbone) -> dict[str, str]:
    """The metadata with layer names without the prefix that some files put before every key."""
    if FORMAT_METADATA not in metadata:
        return metadata
    entry = parse_object(metadata[FORMAT_METADATA], FORMAT_METADATA)
    return {**metadata, FORMAT_METADATA: json.dumps({**entry, "layers": dict(backbone.bare_keys(entry["layers"]))})}


def _layer_formats(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The format of each quantized layer."""
    formats = {}
    for key, tensor in tensors.items():
        if key.endswith(FORMAT_SUFFIX):
            formats[key.removesuffix(FORMAT_SUFFIX)] = str(parse_object(tensor.numpy().tobytes(), key).get("format"))
    return formats


def _check_formats(formats: Mapping[str, str], path: Path) -> None:
    """ValueError when this ComfyUI lacks a format of the file."""
    supported = comfy.quant_ops.QUANT_ALGOS
    missing = sorted(set(formats.values()) - set(supported))
    if missing:
        since = {SINCE[name] for name in missing if name in SINCE}
        update = f"Update ComfyUI to {max(since)} or newer" if since else "Update ComfyUI"
        raise ValueError(
            f"{path} has layers in the format {', '.join(missing)}, which this ComfyUI ({comfyui_version.__version__}) "
            f"does not know; it reads {', '.join(sorted(supported))}. {update}, or use a file in one of those."
        )


def _check_bits(tensors: Mapping[str, Tensor], formats: Mapping[str, str], path: Path) -> None:
    """ValueError when the file has 6-bit layers and ComfyUI's comfy-kitchen reads the format only with 4 bits."""
    if GROUPED not in formats.values():
        return
    known = inspect.signature(comfy.quant_ops.AsymW4A8Int8Layout.quantize).parameters
    wide = [
        layer
        for layer, name in formats.items()
        if name == GROUPED
        and f"{layer}.weight" in tensors
        and tensors[f"{layer}.weight"].shape[1] * 2 != _inputs(tensors, layer, name)
    ]
    if wide and "bits" not in known:
        raise ValueError(
            f"{path} has 6-bit layers ({wide[0]}), which the installed comfy-kitchen "
            f"({importlib.metadata.version('comfy-kitchen')}) does not know. Update it to 0.2.40 or newer (pip install "
            "-U comfy-kitchen), or use a file in another format (int8, w4a8)."
        )


def _inputs(tensors: Mapping[str, Tensor], layer: str, name: str) -> int:
    """Number of inputs of a layer in this format."""
    stored = tensors[f"{layer}.weight"].shape[1]
    scales = tensors.get(f"{layer}.{GROUP_SCALES}")
    if name == GROUPED and scales is not None:
        note = parse_object(tensors[f"{layer}{FORMAT_SUFFIX}"].numpy().tobytes(), layer)
        size = note.get("group_size", GROUP_SIZE)
        if not isinstance(size, int):
            raise ValueError(f"{layer}: group_size is {size!r}, expected a whole number")
        return scales.shape[1] * size
    return stored * 2 if name in HALVED else stored


def _logical(tensors: Mapping[str, Tensor], formats: Mapping[str, str]) -> dict[str, Tensor]:
    """Meta tensors with the unpacked shapes of the weights, without scales and format tensors."""
    shapes = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if layer in formats and kind not in ("weight", "bias"):
            continue
        shape = list(tensor.shape)
        if kind == "weight" and layer in formats:
            shape[1] = _inputs(tensors, layer, formats[layer])
        if kind == "weight" and layer in formats and f"{layer}.bias" in tensors:
            shape[0] = tensors[f"{layer}.bias"].shape[0]  # rows of some formats are padded
        shapes[key] = torch.empty(shape, device="meta")
    return shapes

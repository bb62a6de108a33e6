"""One file with core's quantized layers (comfy_quant, _quantization_metadata, scaled fp8) as a MODEL."""

from __future__ import annotations

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

NOTE, NOTES = ".comfy_quant", "_quantization_metadata"
QUANTIZED = (NOTE, ".weight_scale", ".scale_weight")
# Two numbers a byte, along the inputs. All other formats store a number in an element.
HALVED = ("nvfp4", "convrot_w4a4", "asym_w4a8_int8")
# The first ComfyUI whose core reads a format, as far as it was looked up; for the message only.
SINCE = {
    "mxfp8": "0.33.0",
    "int8_tensorwise": "0.33.0",
    "convrot_w4a4": "0.33.0",
    "asym_w4a8_int8": "0.33.0",
}


def is_quantized(path: Path) -> bool:
    """Whether a file holds core's quantized layers."""
    tensors = Tensors.open(path)
    return NOTES in tensors.metadata or any(key.endswith(QUANTIZED) for key in tensors.entries)


def load_quantized(
    path: Path, space: LatentSpace | None, options: Mapping[str, Any], disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL run by core's mixed-precision operations, from one file with the names of core's own network.

    space: the latent, if the file does not say. ValueError when it is not known, when the keys are of no family's
    network, or when this core does not know a format.
    """
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    family = _family(tensors, path)
    backbone = family.backbone
    metadata = _bare_notes(metadata or {}, backbone)
    tensors, metadata = comfy.utils.convert_old_quants(dict(backbone.bare_keys(tensors)), "", metadata=metadata)
    notes = _notes(tensors)
    _check_formats(notes, path)
    logical = _logical(tensors, notes)
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
    # The marks of quantized layers stay among the shapes: by them the core chooses its operations.
    shapes = {**logical, **{key: value for key, value in tensors.items() if key.endswith(NOTE)}}
    return build(family, Weights(path, shapes, _parts(tensors)), info, options, disable_dynamic)


def _family(tensors: Mapping[str, Tensor], path: Path) -> Family:
    """The family whose network has these keys; ValueError when there is none."""
    names = []
    for family in FAMILIES.values():
        backbone = family.backbone
        keys = backbone.bare_keys(tensors)
        if backbone.matches(keys) and backbone.is_original(keys) is family.original_names:
            return family
        wanted = backbone.original_signature if family.original_names else backbone.diffusers_signature
        kind = "original" if family.original_names else "diffusers"
        names.append(f"a {backbone.title} with the {kind} key names ({wanted[0]} ...)")
    raise ValueError(f"{path}: a quantized model must be {' or '.join(names)}.")


def _parts(tensors: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    return ({name: tensors.pop(name) for name in names} for names in by_layer(list(tensors)))


def _bare_notes(metadata: dict[str, str], backbone: Backbone) -> dict[str, str]:
    """Layer names in the metadata without the prefix that some files put before every key."""
    if NOTES not in metadata:
        return metadata
    notes = parse_object(metadata[NOTES], NOTES)
    return {**metadata, NOTES: json.dumps({**notes, "layers": dict(backbone.bare_keys(notes["layers"]))})}


def _notes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The format of each quantized layer."""
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(NOTE):
            found[key.removesuffix(NOTE)] = str(parse_object(tensor.numpy().tobytes(), key).get("format"))
    return found


def _check_formats(notes: Mapping[str, str], path: Path) -> None:
    """ValueError when this ComfyUI lacks a format of the file."""
    known = comfy.quant_ops.QUANT_ALGOS
    missing = sorted(set(notes.values()) - set(known))
    if missing:
        since = {SINCE[name] for name in missing if name in SINCE}
        update = f"Update ComfyUI to {max(since)} or newer" if since else "Update ComfyUI"
        raise ValueError(
            f"{path} has layers in the format {', '.join(missing)}, which this ComfyUI ({comfyui_version.__version__}) "
            f"does not know; it reads {', '.join(sorted(known))}. {update}, or use a file in one of those."
        )


def _logical(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> dict[str, Tensor]:
    """Meta tensors in the shapes that the layers' weights have when they are not packed, without scales and notes."""
    shapes = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if layer in notes and kind not in ("weight", "bias"):
            continue
        shape = list(tensor.shape)
        if kind == "weight" and notes.get(layer) in HALVED:
            shape[1] *= 2
        if kind == "weight" and layer in notes and f"{layer}.bias" in tensors:
            shape[0] = tensors[f"{layer}.bias"].shape[0]  # rows of some formats are padded
        shapes[key] = torch.empty(shape, device="meta")
    return shapes

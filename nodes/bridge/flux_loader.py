# C latent channels, p patch size
"""FLUX weights on disk as a MODEL: diffusers or original names, any latent, core's quantized layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.utils
import comfyui_version
import torch
from torch import Tensor

from ...dcgen.backbones.base import patch_size
from ...dcgen.files import meta_tensors
from ...dcgen.latent import METADATA_KEY, LatentSpace
from ...dcgen.release import CONFIG_KEY, SCHEDULE_KEY, Model
from ...dcgen.tensors import Tensors
from .flux import FLUX, finish
from .latent_format import ModelInfo, latent_format
from .lora import reporting

T = TypeVar("T")
Parts = Callable[[], Iterable[dict[str, Tensor]]]
NOTE, NOTES = ".comfy_quant", "_quantization_metadata"
QUANTIZED = (NOTE, ".weight_scale", ".scale_weight")


def load_flux(
    source: Model, pixels: int | None = None, options: dict[str, Any] | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from FLUX weights in either naming, read a layer or two at a time: nothing is held twice.

    source: its latent must be known; pixels: the image side it was made for, if known; options: dtype,
    fp8_optimizations, custom_operations as in comfy.sd.load_diffusion_model.
    """
    size = patch_size(FLUX.packed_channels(source.config), source.latent.channels, str(source.tensors.path))
    info = ModelInfo(source.latent, size, dict(source.schedule), pixels)
    plan = list(source.native_entries(source.entries))

    def parts() -> Iterable[dict[str, Tensor]]:
        for rules in by_module((rule for rule, _ in plan), lambda rule: rule.native):
            yield {rule.native: rule.join(source.get) for rule in rules}

    shapes = meta_tensors(entry for _, entry in plan)
    return _build(shapes, parts, source.config, info, source.tensors.path, options or {})


def is_quantized(path: Path) -> bool:
    """Whether a file holds core's quantized layers (comfy_quant, _quantization_metadata, scaled fp8)."""
    tensors = Tensors.open(path)
    return NOTES in tensors.metadata or any(key.endswith(QUANTIZED) for key in tensors.entries)


def load_quantized_flux(path: Path, space: LatentSpace | None, options: dict[str, Any]):
    """A MODEL from one native-keyed file with core's quantized layers, run by core's mixed-precision operations.

    space: the latent, if the file does not say. ValueError when it is not known, or the keys are not FLUX's.
    """
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    metadata = _bare_notes(metadata or {})
    tensors, metadata = comfy.utils.convert_old_quants(dict(FLUX.bare_keys(tensors)), "", metadata=metadata)
    logical = _unpacked(tensors)
    if not FLUX.matches(logical) or not FLUX.is_native(logical):
        raise ValueError(f"{path}: a quantized model must be a FLUX with the original key names (double_blocks. ...).")
    _check_formats(tensors, path)
    config = json.loads(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else FLUX.detect(logical)
    space = LatentSpace.from_metadata(metadata) if METADATA_KEY in metadata else space
    if space is None:
        raise ValueError(f"{path} does not say which autoencoder its latents come from. Choose it in `autoencoder`.")
    schedule = json.loads(metadata[SCHEDULE_KEY]) if SCHEDULE_KEY in metadata else FLUX.default_schedule(space, config)
    info = ModelInfo(space, patch_size(FLUX.packed_channels(config), space.channels, str(path)), schedule)

    def parts() -> Iterable[dict[str, Tensor]]:
        return ({key: tensors[key] for key in keys} for keys in by_module(tensors, str))

    return _build(tensors, parts, config, info, path, options)


def _bare_notes(metadata: dict[str, str]) -> dict[str, str]:
    """Layer names in the metadata without the prefix that some files put before every key."""
    if NOTES not in metadata:
        return metadata
    notes = json.loads(metadata[NOTES])
    return {**metadata, NOTES: json.dumps({**notes, "layers": dict(FLUX.bare_keys(notes["layers"]))})}


def _check_formats(tensors: Mapping[str, Tensor], path: Path) -> None:
    """ValueError when this ComfyUI lacks a format of the file."""
    known = comfy.quant_ops.QUANT_ALGOS
    notes = [json.loads(tensor.numpy().tobytes()) for key, tensor in tensors.items() if key.endswith(NOTE)]
    missing = sorted({str(note.get("format")) for note in notes} - set(known))
    if missing:
        raise ValueError(
            f"{path} has layers in the format {', '.join(missing)}, which this ComfyUI ({comfyui_version.__version__}) "
            f"does not know; it reads {', '.join(sorted(known))}. Update ComfyUI, or use a file in one of those."
        )


def _unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta tensors in the shapes that the layers have when they are not packed (nvfp4: two numbers a byte)."""
    shapes = {}
    for key, tensor in tensors.items():
        shape = list(tensor.shape)
        if key.endswith(".weight") and tensor.dtype == torch.uint8:
            shape[1] *= 2
        shapes[key] = torch.empty(shape, device="meta")
    return shapes


def _build(
    shapes: Mapping[str, Tensor],
    parts: Parts,
    config: dict[str, Any],
    info: ModelInfo,
    path: Path,
    options: dict[str, Any],
) -> comfy.model_patcher.ModelPatcher:
    """The BaseModel and its patcher. shapes: every native key (meta tensors do); parts: the weights by module."""
    model_config = comfy.model_detection.model_config_from_unet(dict(shapes), "")
    if model_config is None:
        raise ValueError(f"{path}: ComfyUI does not take these weights for a FLUX model.")
    heads = config["num_attention_heads"]
    model_config.unet_config.update(
        num_heads=heads,
        hidden_size=heads * config["attention_head_dim"],
        axes_dim=list(config["axes_dims_rope"]),
        context_in_dim=config["joint_attention_dim"],
        vec_in_dim=config["pooled_projection_dim"],
        in_channels=info.space.channels,
        out_channels=info.space.channels,
        patch_size=info.patch_size,
    )
    model_config.latent_format = latent_format(info.space)
    set_dtype(model_config, shapes, options)
    model = model_config.get_model(dict(shapes), "").to(comfy.model_management.unet_offload_device())
    loaded: set[str] = set()
    for part in parts():
        loaded |= _fill(model.diffusion_model, model_config.process_unet_state_dict(part), path)
    absent = sorted({module_of(key) for key in model.diffusion_model.state_dict()} - loaded)
    if absent:
        raise ValueError(f"{path}: no weights for {', '.join(absent[:8])}. The file is incomplete; download it again.")
    finish(model, info)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    kind = reporting(kind) if info.patch_size == 1 else kind
    load_device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return kind(model, load_device=load_device, offload_device=offload)


def set_dtype(model_config: Any, shapes: Mapping[str, Tensor], options: dict[str, Any]) -> None:
    device = comfy.model_management.get_torch_device()
    supported = list(model_config.supported_inference_dtypes)
    quantized = model_config.quant_config is not None
    dtype = options.get("dtype") if not quantized else None
    dtype = dtype or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(shapes),
        supported_dtypes=supported,
        weight_dtype=None if quantized else comfy.utils.weight_dtype(shapes),
    )
    cast = comfy.model_management.unet_manual_cast(None if quantized else dtype, device, supported)
    model_config.set_inference_dtype(dtype, cast)
    model_config.custom_operations = options.get("custom_operations")
    if options.get("fp8_optimizations"):
        model_config.optimizations["fp8"] = True


def by_module(items: Iterable[T], name: Callable[[T], str]) -> list[list[T]]:
    """Items grouped by the part of a block (or top-level module) that their native key belongs to."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(module_of(name(item)), []).append(item)
    return list(groups.values())


def module_of(key: str) -> str:
    pieces = key.split(".")
    return ".".join(pieces[: 3 if pieces[0].endswith("_blocks") else 1])


def _fill(network: torch.nn.Module, part: dict[str, Tensor], file: Path) -> set[str]:
    """Load whole modules into the network, strictly: a key too many or too few is an error. Returns which modules."""
    loaded = set()
    for keys in by_module(part, str):
        path = module_of(keys[0])
        try:
            network.get_submodule(path).load_state_dict({key[len(path) + 1 :]: part[key] for key in keys})
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"{file}: the weights of {path} do not fit this FLUX: {error}") from error
        loaded.add(path)
    return loaded

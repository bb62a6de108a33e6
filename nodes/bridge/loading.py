"""Strict loading of weights into a core model, one layer at a time, and the choice of its dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...dcgen.files import SUFFIXES
from ...dcgen.tensors import Tensors

Parts = Iterable[dict[str, Tensor]]
LISTED = 8


def set_dtype(model_config: Any, shapes: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Set storage and compute dtype of a model_config, chosen as core does for weights of these dtypes.

    options: dtype, fp8_optimizations, custom_operations as in comfy.sd.load_diffusion_model.
    """
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


def new_patcher(model: nn.Module, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A patcher of the class that core's own loaders use (dynamic by default, in versions that have it)."""
    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    load_device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return kind(model, load_device=load_device, offload_device=offload)


def is_dynamic(patcher: Any) -> bool:
    """Whether weights move to the device on use (dynamic VRAM; older versions of ComfyUI lack it)."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Tensor names grouped by module; the group "" holds those without a module."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return list(groups.values())


def mapped(tensors: Tensors) -> Tensors:
    """The same tensors in core's memory map of the files: core reads them, from disk to the device, when it uses them.

    Only for a network with a dynamic patcher: the pages are read-only. Files that are no safetensors are not mapped.
    """
    files = {file for file, _ in tensors.places.values()}
    if not all(file.suffix in SUFFIXES for file in files):
        return tensors
    return tensors.with_values({file: comfy.utils.load_torch_file(str(file)) for file in files})


def fill(network: nn.Module, parts: Parts, file: Any, assign: bool = False) -> None:
    """Load `parts` (tensors by the network's own names, whole layers together) strictly.

    assign: use the tensors themselves without cast or copy, as core's dynamic patcher requires. ValueError, naming
    `file`, for a tensor that is missing, unknown or of another shape; the network is then only partly loaded.
    """
    loaded: set[str] = set()
    for part in parts:
        for names in by_layer(part):
            _fill_layer(network, {name: part[name] for name in names}, file, assign)
        loaded |= set(part)
    missing = sorted(_expected(network) - loaded)
    if missing:
        raise ValueError(f"{file}: no weights for {_some(missing)}. The file is incomplete; download it again.")
    mismatches = list(_mismatches(network))
    if mismatches:
        raise ValueError(f"{file}: the weights do not fit the model it describes: {_some(mismatches)}")


def _fill_layer(network: nn.Module, layer: Mapping[str, Tensor], file: Any, assign: bool) -> None:
    path = next(iter(layer)).rpartition(".")[0]
    try:
        target = network.get_submodule(path)
        tensors = {name[len(path) + bool(path) :]: value for name, value in layer.items()}
        if not assign:
            tensors = {name: _cast(target, name, value) for name, value in tensors.items()}
        if any(True for _ in target.children()):  # parameters of a module that has layers below it
            for name, value in tensors.items():
                _set(target, name, value, assign)
        else:
            target.load_state_dict(tensors, strict=True, assign=assign)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: the weights of {path or list(layer)} do not fit this model: {error}") from error


def _cast(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """In the dtype that core has recorded for a parameter; layers whose weights do not exist yet would not cast it."""
    dtype = getattr(module, f"{name}_comfy_model_dtype", None)
    return value.to(dtype) if isinstance(dtype, torch.dtype) and value.is_floating_point() else value


def _set(module: nn.Module, name: str, value: Tensor, assign: bool) -> None:
    target = module.get_parameter(name)
    if target.shape != value.shape:
        raise RuntimeError(f"{name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    if assign:
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    else:
        target.data.copy_(value)


def _expected(network: nn.Module) -> set[str]:
    """Names of all parameters, also those that layers create only when they are loaded."""
    lazy = {f"{name}.weight" for name, module in network.named_modules() if _geometry(module) is not None}
    return lazy | {name for name, _ in network.named_parameters()}


def _mismatches(network: nn.Module) -> Iterator[str]:
    """Layers whose weights have another shape than the layer's own sizes (not all of core's layers check that)."""
    for name, module in network.named_modules():
        shape, weight = _geometry(module), getattr(module, "weight", None)
        if shape is not None and weight is not None and tuple(weight.shape) != shape:
            yield f"{name}.weight {tuple(weight.shape)} instead of {shape}"
        bias = getattr(module, "bias", None)
        if shape is not None and isinstance(bias, Tensor) and tuple(bias.shape) != shape[:1]:
            yield f"{name}.bias {tuple(bias.shape)} instead of {shape[:1]}"


def _geometry(module: nn.Module) -> tuple[int, int] | None:
    """Shape of the weight of a Linear or an Embedding, from the sizes it was built with."""
    for rows, columns in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if isinstance(getattr(module, rows, None), int) and isinstance(getattr(module, columns, None), int):
            return getattr(module, rows), getattr(module, columns)
    return None


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest

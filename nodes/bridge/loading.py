"""Weights into a core model: which dtype, a layer at a time, nothing too few, too many or of another shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

Parts = Iterable[dict[str, Tensor]]
LISTED = 8


def set_dtype(model_config: Any, shapes: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Storage and computing dtype of a model_config, as the core chooses them for weights of these dtypes.

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
    """A patcher of the kind that the core's own loaders make (dynamic on a default start, where it has that)."""
    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    load_device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return kind(model, load_device=load_device, offload_device=offload)


def is_dynamic(patcher: Any) -> bool:
    """Whether weights come to the device when they are used (dynamic VRAM, which older cores have not)."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Tensor names grouped by the module they belong to; what stands beside the modules is under ""."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return list(groups.values())


def fill(network: nn.Module, parts: Parts, file: Any, assign: bool = False) -> None:
    """Load `parts` (tensors by the network's own names, whole layers together) strictly.

    assign: take the tensors themselves, uncast and uncopied, which the core's dynamic patcher wants. ValueError, naming
    `file`, for a tensor that is missing, unknown or of another shape; then the network is no use.
    """
    loaded: set[str] = set()
    for part in parts:
        for names in by_layer(part):
            _fill_layer(network, {name: part[name] for name in names}, file, assign)
        loaded |= set(part)
    absent = sorted(_expected(network) - loaded)
    if absent:
        raise ValueError(f"{file}: no weights for {_some(absent)}. The file is incomplete; download it again.")
    misfits = list(_misfits(network))
    if misfits:
        raise ValueError(f"{file}: the weights do not fit the model it describes: {_some(misfits)}")


def _fill_layer(network: nn.Module, layer: Mapping[str, Tensor], file: Any, assign: bool) -> None:
    path = next(iter(layer)).rpartition(".")[0]
    try:
        target = network.get_submodule(path)
        bare = {name[len(path) + bool(path) :]: value for name, value in layer.items()}
        if not assign:
            bare = {name: _cast(target, name, value) for name, value in bare.items()}
        if any(True for _ in target.children()):  # parameters of a module that has layers below it
            for name, value in bare.items():
                _set(target, name, value, assign)
        else:
            target.load_state_dict(bare, strict=True, assign=assign)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: the weights of {path or list(layer)} do not fit this model: {error}") from error


def _cast(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """In the dtype that the core notes for a parameter, which its layers without weights yet would not give it."""
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
    """Names of all parameters, also of layers that make theirs only when they are loaded."""
    lazy = {f"{name}.weight" for name, module in network.named_modules() if _geometry(module) is not None}
    return lazy | {name for name, _ in network.named_parameters()}


def _misfits(network: nn.Module) -> Iterator[str]:
    """Layers whose weights have another shape than the layer says (not every layer of the core checks that)."""
    for name, module in network.named_modules():
        shape, weight = _geometry(module), getattr(module, "weight", None)
        if shape is not None and weight is not None and tuple(weight.shape) != shape:
            yield f"{name}.weight {tuple(weight.shape)} instead of {shape}"
        bias = getattr(module, "bias", None)
        if shape is not None and isinstance(bias, Tensor) and tuple(bias.shape) != shape[:1]:
            yield f"{name}.bias {tuple(bias.shape)} instead of {shape[:1]}"


def _geometry(module: nn.Module) -> tuple[int, int] | None:
    """Shape of the weight that a Linear or an Embedding is for, by what it was built with."""
    for rows, columns in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if isinstance(getattr(module, rows, None), int) and isinstance(getattr(module, columns, None), int):
            return getattr(module, rows), getattr(module, columns)
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def renamed(parts: Parts, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Parts after the core's own last change of names (some cores call a norm's `scale` its `weight`)."""
    for part in parts:
        yield rename(part)
        part.clear()

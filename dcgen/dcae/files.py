"""Read and write DC-AE files: both key formats, single file or diffusers folder, every doubt an error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..fields import shown
from ..files import is_finite, replacing, weight_files
from ..jsons import parse_object, read_object
from ..kinds import is_quantised, what_it_may_be
from ..latent import METADATA_KEY, LatentSpace
from ..tensors import PICKLES, Tensors
from .config import DCAEConfig, DCAEError
from .keys import (
    FORMATS,
    candidates,
    find_format,
    from_original,
    infer_config,
    original_shapes,
    rename_table,
    to_original,
)
from .model import DCAE
from .variants import VARIANTS

CONFIG_KEY, HASH_KEY = "dcgen.dcae", "dcgen.sha256"
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclasses.dataclass
class _Source:
    """What was found: tensors, safetensors metadata, a config.json beside them, and what to call it in errors."""

    state: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    label: str
    stem: str


def load_dcae(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    scaling_factor: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    operations: Any = nn,
) -> DCAE:
    """Load a DC-AE from a .safetensors (or .pt) file, a diffusers folder, or a state dict, in either key format.

    The architecture comes from config.json or the file's metadata if there is one, else from the tensors. Name and
    scale come from `scaling_factor`, metadata, config.json, or the one published variant that fits, in this order.
    dtype: None keeps the file's. Returns the model in eval mode without gradients.

    Raises DCAEError, before any compute, for a file which is not a DC-AE, is damaged, has missing, unexpected or
    misshapen tensors, or leaves the scale open (the message lists the candidates).
    """
    found = _open(source)
    form = find_format(list(found.state))
    if form is None:
        raise DCAEError(
            f"{found.label}: not a DC-AE. Expected keys like 'decoder.stages.*' (original) or 'decoder.up_blocks.*' "
            f"(diffusers), found {_some(list(found.state))}. {what_it_may_be(found.state, '')}"
        )
    kind, prefix = form
    if is_quantised(found.state):
        raise DCAEError(f"{found.label}: a quantised DC-AE (its weights have scales beside them): take the plain one")
    state = {key.removeprefix(prefix): tensor for key, tensor in found.state.items()}
    _check_ranks(state, found.label)
    try:
        seen = infer_config({key: tensor.shape for key, tensor in state.items()}, kind)
    except (KeyError, IndexError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise DCAEError(f"{found.label}: the tensors do not form a DC-AE: {error}. Fetch the file again") from error
    config = _settle(found, seen, scaling_factor)
    state = _renamed(config, state, kind, found.label)
    _check_values(state, found)
    dtype = dtype or _computing(state["decoder.conv_in.weight"].dtype)
    state = {key: _placed(tensor, dtype, device) for key, tensor in state.items()}
    model = DCAE(config, operations=operations, dtype=dtype, device="meta")
    model.load_state_dict(state, strict=True, assign=True)
    stored = _stored_space(found, config)
    if stored is not None and stored.rgb_factors is not None:
        model.rgb_factors, model.rgb_bias = stored.rgb_factors, stored.rgb_bias
    return model.eval().requires_grad_(False)


def save_dcae(
    model: DCAE, path: str | os.PathLike[str], *, format: str = "diffusers", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `model` whole or not at all; returns the weights file.

    path: a *.safetensors file, or a folder (then config.json is written beside the weights). format: "diffusers" or
    "original" key names. Config, latent scale, preview factors and a checksum go into the file's metadata.
    """
    if format not in FORMATS:
        raise DCAEError(f"save_dcae format is {format!r}, expected one of {FORMATS}")
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    if format == "original":
        state = to_original(state, rename_table(model.config, list(state)))
        state = {key: tensor.contiguous() for key, tensor in state.items()}
    config = model.config.to_diffusers()
    notes = {CONFIG_KEY: json.dumps(config, sort_keys=True), HASH_KEY: checksum(state), "format": "pt"}
    notes |= model.latent_space.to_metadata() | dict(metadata or {})
    target = Path(path)
    if target.suffix != ".safetensors":
        with replacing(target / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
        target = target / (WEIGHT_NAMES[0] if format == "diffusers" else WEIGHT_NAMES[1])
    with replacing(target) as temporary:
        save_file(state, temporary, metadata=notes)
    return target


def checksum(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> _Source:
    if isinstance(source, Mapping):
        return _Source(_unwrapped(source, "state dict"), {}, None, "state dict", "")
    path = Path(source)
    if path.is_dir():
        present = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
        present = present or weight_files(path)
        if len(present) != 1:
            names = ", ".join(item.name for item in present) or "none"
            raise DCAEError(
                f"{path}: expected one DC-AE weights file ({' or '.join(WEIGHT_NAMES)}) in this folder, found {names}"
            )
        return _read(present[0], path / "config.json", path.name)
    if not path.is_file():
        raise DCAEError(f"{path}: no such file or folder; give a .safetensors file or a diffusers folder")
    own = path.with_suffix(".json")
    return _read(path, own if own.is_file() else path.parent / "config.json", path.stem)


def _read(path: Path, config: Path, stem: str) -> _Source:
    try:
        tensors = Tensors.open(path)
        state = {name: tensors.get(name) for name in tensors.entries}
    except (ValueError, OSError) as error:
        kind = "PyTorch" if path.suffix in PICKLES else "safetensors"
        raise DCAEError(f"{path}: damaged, truncated or not a {kind} file: {error}") from error
    return _Source(state, tensors.metadata, _config_json(config), str(path), stem)


def _unwrapped(state: Any, label: str) -> dict[str, Tensor]:
    while isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DCAEError(f"{label}: expected a mapping of names to tensors (a state dict)")
    return dict(state)


def _config_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except ValueError as error:
        raise DCAEError(str(error)) from error


def _check_ranks(state: Mapping[str, Tensor], label: str) -> None:
    video = [key for key, tensor in state.items() if tensor.ndim == 5]
    if video:
        raise DCAEError(f"{label}: a video autoencoder (DC-AE-V): {_some(video)} have 5 dimensions; this reads images")


def _settle(found: _Source, seen: DCAEConfig, scaling_factor: float | None) -> DCAEConfig:
    """Decide architecture, name and scale; refuse when two answers remain."""
    given = _given_config(found)
    config = given or seen
    fits = candidates(config)
    if given is None:
        scales = {variant.scaling_factor for variant in fits}
        scale = scaling_factor if scaling_factor is not None else scales.pop() if len(scales) == 1 else None
        if scale is None:
            raise DCAEError(_open_scale(found.label, fits))
    else:
        scale = scaling_factor if scaling_factor is not None else given.scaling_factor
        if scale is None:
            raise DCAEError(_open_scale(found.label, fits))
    named = [variant.name for variant in fits if variant.scaling_factor == scale]
    if config.name not in VARIANTS:
        hinted = [name for name in named if name in found.stem]
        named_one = (hinted or named or [""])[0]
        name = named_one or config.name or found.stem
        config = dataclasses.replace(config, name=name)
    return dataclasses.replace(config, scaling_factor=float(scale))


def _open_scale(label: str, fits: list[DCAEConfig]) -> str:
    if not fits:
        return (
            f"{label}: a DC-AE of no published architecture and no config.json beside it; "
            "put its config.json there or pass scaling_factor= (1 / RMS of its raw latents)"
        )
    names = " or ".join(f"{fit.name} (scaling_factor={fit.scaling_factor or 'unpublished'})" for fit in fits)
    return (
        f"{label}: the tensors alone do not tell {names}. Put its config.json beside the file, or pass the "
        "scaling_factor= of the right one"
    )


def _given_config(found: _Source) -> DCAEConfig | None:
    if CONFIG_KEY in found.metadata:
        try:
            return DCAEConfig.from_diffusers(parse_object(found.metadata[CONFIG_KEY], CONFIG_KEY))
        except ValueError as error:
            raise DCAEError(f"{found.label}: metadata {CONFIG_KEY!r} is not a DC-AE config ({error})") from error
    values = found.config
    if values is None:
        return None
    name = values.get("model_name", "")
    if not isinstance(name, str):
        raise DCAEError(f"{found.label}: config.json: model_name is {shown(name)}, expected text")
    if name and "encoder_block_out_channels" not in values:  # mit-han-lab / dc-ai repositories
        if name not in VARIANTS:
            raise DCAEError(f"{found.label}: config.json names {shown(name)}; known are {', '.join(VARIANTS)}")
        return VARIANTS[name]
    try:
        config = DCAEConfig.from_diffusers(values)
    except DCAEError as error:
        raise DCAEError(f"{found.label}: {error}") from error
    # diffusers leaves the path of whoever saved it there; only the last part can be a name
    return dataclasses.replace(config, name=Path(config.name).name.removesuffix("-diffusers"))


def _renamed(config: DCAEConfig, state: dict[str, Tensor], kind: str, label: str) -> dict[str, Tensor]:
    # Of torch's own layers: ComfyUI's have no weights before they are loaded (dynamic VRAM), and then check no shapes.
    try:
        shapes = {key: tensor.shape for key, tensor in DCAE(config, device="meta").state_dict().items()}
    except (ValueError, RuntimeError, ZeroDivisionError) as error:  # torch's layers, of numbers that do not go together
        raise DCAEError(f"{label}: its config describes no network that can be built: {error}") from error
    table = rename_table(config, list(shapes)) if kind == "original" else {}
    wanted = original_shapes(table, shapes) if kind == "original" else shapes
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}  # a training counter some writers drop
    missing = sorted(set(wanted) - set(state) - optional)
    extra = sorted(set(state) - set(wanted))
    bent = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    bent += [
        f"{key} {state[key].dtype} instead of floating point"
        for key in wanted
        if key in state and key not in optional and not state[key].is_floating_point()
    ]
    if missing or extra or bent:
        listed = [
            f"{title}: {_some(keys, 12)}"
            for title, keys in (("missing", missing), ("unexpected", extra), ("misshapen", bent))
            if keys
        ]
        name = config.name or "DC-AE"
        raise DCAEError(
            f"{label}: the tensors do not fit {name!r} ({kind} keys). {'; '.join(listed)}. The file is damaged, or "
            "its config belongs to another autoencoder"
        )
    state = {key: state.get(key, torch.tensor(0)) for key in wanted}
    return from_original(state, table) if kind == "original" else state


def _check_values(state: Mapping[str, Tensor], found: _Source) -> None:
    """A checksum where the writer left one; in any case no weight may be NaN or infinite."""
    expected = found.metadata.get(HASH_KEY)
    if expected is not None and checksum(found.state) != expected:
        raise DCAEError(
            f"{found.label}: damaged (the tensors do not match the checksum in its metadata); fetch it again"
        )
    broken = [key for key, tensor in state.items() if not is_finite(tensor)]
    if broken:
        raise DCAEError(f"{found.label}: damaged, NaN or infinite weights in {_some(broken)}; fetch it again")


def _computing(stored: torch.dtype) -> torch.dtype:
    """The type to compute in: the file's, but bfloat16 for one-byte floats, which have no arithmetic."""
    return torch.bfloat16 if stored.itemsize == 1 else stored


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None).contiguous()


def _stored_space(found: _Source, config: DCAEConfig) -> LatentSpace | None:
    """The space with preview factors that the file's metadata holds, if it does."""
    if METADATA_KEY not in found.metadata:
        return None
    try:
        space = LatentSpace.from_metadata(found.metadata)
    except ValueError as error:
        raise DCAEError(f"{found.label}: {error}") from error
    if space.channels != config.latent_channels:
        raise DCAEError(
            f"{found.label}: its metadata speaks of {space.channels} latent channels, its config of "
            f"{config.latent_channels}; fetch it again"
        )
    return space


def _some(keys: list[str], count: int = 5) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(key if len(key) < 200 else shown(key) for key in keys[:count]) + more

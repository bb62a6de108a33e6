"""Read and write DC-AE files: both key formats, single file or diffusers folder, every doubt an error."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import Entry, is_finite, replacing, weight_files
from ..jsons import read_object
from ..tensors import PICKLES, Tensors
from .config import DCAEConfig, DCAEError
from .identify import CONFIG_KEY, identify
from .keys import FORMATS, from_stored, listed, rename_table, stored_names, to_original
from .model import DCAE

HASH_KEY = "dcgen.sha256"
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclasses.dataclass(frozen=True)
class DCAESource:
    """An opened DC-AE whose tensors are not read yet: their names, dtypes and shapes, metadata, and a config.json.

    path: the file or folder, None for a state dict; label names the weights in errors; stem names the autoencoder if
    nothing else does; get: one tensor by its name in the file.
    """

    path: Path | None
    label: str
    stem: str
    entries: Mapping[str, Entry | Tensor]
    get: Callable[[str], Tensor]
    metadata: Mapping[str, str]
    config_json: Mapping[str, Any] | None


def load_dcae(
    source: str | os.PathLike[str] | Mapping[str, Tensor] | DCAESource,
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
    source = source if isinstance(source, DCAESource) else open_dcae(source)
    with _naming(source.label):
        identity = identify(source.entries, source.metadata, source.config_json, source.stem, scaling_factor)
        table = stored_names(identity.bare(source.entries), identity.format, identity.config, _shapes(identity.config))
        state = from_stored(identity.bare(_read(source)), table)
        _check_finite(state)
    dtype = dtype or _compute_dtype(state["decoder.conv_in.weight"].dtype)
    model = DCAE(identity.config, operations=operations, dtype=dtype, device="meta")
    model.load_state_dict({key: _cast(tensor, dtype, device) for key, tensor in state.items()}, assign=True)
    if identity.stored_space is not None:
        model.rgb_factors, model.rgb_bias = identity.stored_space.rgb_factors, identity.stored_space.rgb_bias
    return model.eval().requires_grad_(False)


def open_dcae(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> DCAESource:
    """Open a file, a diffusers folder or a state dict, and the config.json beside it; errors as in load_dcae."""
    if isinstance(source, Mapping):
        state = _unwrapped(source)
        return DCAESource(None, "state dict", "", state, state.__getitem__, {}, None)
    path = Path(source)
    if path.is_dir():
        weights, config, stem = _weights_in(path), path / "config.json", path.name
    elif path.is_file():
        own = path.with_suffix(".json")
        weights, config, stem = path, own if own.is_file() else path.parent / "config.json", path.stem
    else:
        raise DCAEError(f"{path}: no such file or folder; give a .safetensors file or a diffusers folder")
    try:
        stored = Tensors.open(weights)
    except (ValueError, OSError) as error:
        kind = "PyTorch" if weights.suffix in PICKLES else "safetensors"
        raise DCAEError(f"{weights}: damaged, truncated or not a {kind} file: {error}") from error
    try:
        config_json = read_object(config) if config.is_file() else None
    except ValueError as error:
        raise DCAEError(str(error)) from error
    return DCAESource(path, str(weights), stem, stored.entries, stored.get, stored.metadata, config_json)


def _unwrapped(state: Any) -> dict[str, Tensor]:
    while isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DCAEError("state dict: expected a mapping of names to tensors (a state dict)")
    return dict(state)


def _weights_in(folder: Path) -> Path:
    present = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()] or weight_files(folder)
    if len(present) != 1:
        names = ", ".join(file.name for file in present) or "none"
        raise DCAEError(
            f"{folder}: expected one DC-AE weights file ({' or '.join(WEIGHT_NAMES)}) in this folder, found {names}"
        )
    return present[0]


@contextlib.contextmanager
def _naming(label: str) -> Iterator[None]:
    """Put what is being loaded before the text of a DCAEError."""
    try:
        yield
    except DCAEError as error:
        raise DCAEError(f"{label}: {error}") from error.__cause__


def _shapes(config: DCAEConfig) -> dict[str, torch.Size]:
    """Key and shape of every tensor of the config's network.

    Of torch's own layers: ComfyUI's have no weights before they are loaded (dynamic VRAM), and then check no shapes.
    """
    try:
        return {key: tensor.shape for key, tensor in DCAE(config, device="meta").state_dict().items()}
    except (ValueError, RuntimeError, ZeroDivisionError) as error:  # torch's layers, of numbers that do not go together
        raise DCAEError(f"its config describes no network that can be built: {error}") from error


def _read(source: DCAESource) -> dict[str, Tensor]:
    """All tensors; they must be those that the writer left a checksum of, where it did."""
    try:
        tensors = {name: source.get(name) for name in source.entries}
    except (ValueError, OSError) as error:
        raise DCAEError(f"damaged or truncated: {error}") from error
    expected = source.metadata.get(HASH_KEY)
    if expected is not None and checksum(tensors) != expected:
        raise DCAEError("damaged (the tensors do not match the checksum in its metadata); fetch it again")
    return tensors


def _check_finite(state: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in state.items() if not is_finite(tensor)]
    if broken:
        raise DCAEError(f"damaged, NaN or infinite weights in {listed(broken)}; fetch it again")


def _compute_dtype(stored: torch.dtype) -> torch.dtype:
    """The type to compute in: the file's, but bfloat16 for one-byte floats, which have no arithmetic."""
    return torch.bfloat16 if stored.itemsize == 1 else stored


def _cast(tensor: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None).contiguous()


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

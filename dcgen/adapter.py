# r rank, C latent channels, D width
"""The DC-Gen adapter: one .safetensors with a new patch embedder, a new output head and LoRA for one base model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import files
from .backbones import BACKBONES, Backbone
from .backbones.base import PATCH
from .backbones.keymap import describe_keys
from .fields import shown
from .identity import BaseIdentity, bits_of
from .jsons import parse_object
from .kinds import what_it_may_be
from .latent import METADATA_KEY, LatentSpace
from .release import Model
from .schedule import Schedule

FORMAT = "2"
SUPPORTED = ("1", "2")  # format 1 has no latent and no identity of the base
LORA_PREFIX = "transformer."
ALPHA_LIMIT = 1e6
MERGED_VALUES = 1 << 22  # merged at a time
REMEDY = "Choose a file that DC-Gen training wrote."
SECOND_STEP = (
    "for a second step (1K over 512) that is the first step's merged model. Or use the adapter that `export` writes "
    "for the first base, or make it with python -m dcgen.convert extract MERGED BASE OUT."
)
BASE_WEIGHTS, BASE_LATENT = "dcgen.base_weights", "dcgen.base_latent"
UNMERGED_WEIGHTS = "dcgen.unmerged_weights"
_REQUIRED = ("dcgen.format", "dcgen.backbone", METADATA_KEY, "dcgen.patch_size", "dcgen.base", "dcgen.schedule")
_RESERVED = (*_REQUIRED, BASE_WEIGHTS, BASE_LATENT, UNMERGED_WEIGHTS)
_LORA_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".alpha": "alpha"}


@dataclass
class LoraPair:
    """The LoRA of one layer: delta W = (alpha/r) * B @ A, with A (r,in) and B (out,r).

    For a 1x1 convolution, as in peft, A (r,in,1,1) and B (out,r,1,1).
    """

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, strength: float = 1.0, start: int = 0, stop: int | None = None) -> Tensor:
        """strength * (alpha/r) * B @ A in the shape of the layer's weight, or its rows start:stop; float32 on A's
        device.
        """
        B = self.B[start:stop]
        change = (strength * self.scale) * (B.flatten(1).float() @ self.A.flatten(1).float())
        return change.reshape(len(B), *self.A.shape[1:])

    def shaped(self, weight: tuple[int, ...]) -> LoraPair:
        """The same pair for a layer with a weight of this shape: (out,in) or (out,in,1,1)."""
        ones = (1,) * (len(weight) - 2)
        return LoraPair(
            self.A.reshape(self.rank, weight[1], *ones), self.B.reshape(weight[0], self.rank, *ones), self.alpha
        )


@dataclass
class Adapter:
    """The weights that move a base model to another latent space.

    backbone: key of BACKBONES; tensors: embedder and head (and, when trained, the norm before the head) by diffusers
    name; lora: by diffusers module path without prefix; latent: the latent space after the move; base:
    Backbone.base_signature of the base it was trained on; schedule: a Schedule, or {"rule": ...} as in a file;
    base_weights, base_latent: identity of that base's weights, and its latent space, if known; unmerged_weights: of an
    adapter for blocks with a merged LoRA (dcgen.merge.split), the identity of the base without it; metadata: other
    strings, such as `modelspec.*`.
    """

    backbone: str
    tensors: dict[str, Tensor]
    lora: dict[str, LoraPair]
    latent: LatentSpace
    base: dict[str, Any]
    schedule: Schedule
    patch_size: int = 1
    metadata: dict[str, str] = field(default_factory=dict)
    base_weights: BaseIdentity | None = None
    base_latent: LatentSpace | None = None
    unmerged_weights: BaseIdentity | None = None

    def __post_init__(self) -> None:
        self.schedule = Schedule.parse(self.schedule)

    @property
    def model(self) -> Backbone:
        return _backbone(self.backbone)

    def check_base(self, signature: Mapping[str, Any], source_name: str) -> None:
        """ValueError when a base with this signature (of the same backbone) is not the one this was trained on."""
        actual, expected = _plain(signature), _plain(self.base)
        differences = [
            f"{key}: {actual.get(key, 'absent')} (this adapter needs {expected.get(key, 'absent')})"
            for key in sorted({*actual, *expected})
            if actual.get(key) != expected.get(key)
        ]
        if differences:
            raise ValueError(
                f"{source_name} is not a base for this {self.backbone} adapter: {'; '.join(differences)}. "
                "Load the base that the adapter was trained on, or an adapter made for this base."
            )

    def check_weights(self, weights: BaseIdentity, bits: int, source_name: str) -> None:
        """ValueError when this was trained on other weights than these, which have `bits` bits per value; a warning in
        the log when that is unknown.
        """
        self._check_merged(weights, source_name)
        same = None if self.base_weights is None else self.base_weights.is_of(weights, bits)
        title = self.metadata.get("modelspec.title", "this adapter")
        if same is None:
            name = title if self.base_weights is None else source_name
            logging.warning("DC-Gen: %s does not say which base's weights it has; use the base of %s", name, title)
        if same is False:
            raise ValueError(
                f"{title} was trained over other weights than those of {source_name}, which would give noise. "
                f"Load the base that it was trained over: {SECOND_STEP}"
            )

    def _check_merged(self, weights: BaseIdentity, source_name: str) -> None:
        """ValueError when these weights are rather the base without the LoRA that this adapter expects in its blocks.

        At few bits both may be within the rounding of the format, so the nearer one counts.
        """
        if self.base_weights is None or self.unmerged_weights is None:
            return
        merged, plain = self.base_weights.distance(weights), self.unmerged_weights.distance(weights)
        if merged is not None and plain is not None and plain < merged:
            title = self.metadata.get("modelspec.title", "this adapter")
            raise ValueError(
                f"{source_name} is the base without DC-Gen's LoRA, and {title} has only an embedder and a head. Load "
                "the file of merged blocks that was written with it, or apply the whole adapter to this base."
            )

    def check_base_latent(self, space: LatentSpace, source_name: str) -> None:
        """ValueError when a base on the latent `space` is not the one this was trained on, as far as that is known."""
        if self.base_latent is not None:
            differences = self.base_latent.differences(space)
        else:
            factor = self.model.base_spatial_factor
            mismatch = factor not in (None, space.spatial_factor)
            differences = [f"f{space.spatial_factor} against f{factor}"] if mismatch else []
            if not self.latent.differences(space):
                differences = ["the adapter's own"]
        if differences:
            advice = f": {SECOND_STEP}" if self.base_latent is not None and self.latent.differences(space) else "."
            raise ValueError(
                f"{source_name} already runs on {space.name or 'another latent'}, which is not the latent of the base "
                f"that this adapter was trained on ({'; '.join(differences)}). Connect the base's own loader{advice}"
            )

    def check_latent(self, space: LatentSpace, source_name: str = "the latent") -> None:
        """ValueError when latents of `space` are not what this adapter was trained on."""
        differences = space.differences(self.latent)
        if differences:
            expected = self.latent
            raise ValueError(
                f"{source_name} does not belong to this adapter ({'; '.join(differences)}). It needs the autoencoder "
                f"{expected.name or 'it was trained with'}: {expected.channels} channels, f{expected.spatial_factor}, "
                f"scaling factor {expected.scaling_factor:g}."
            )

    def check(self) -> None:
        """ValueError unless names, shapes, LoRA pairs and patch size are consistent."""
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        PATCH("patch_size", self.patch_size)
        model = self.model
        model.check_base_signature(self.base)
        required = model.latent_shapes(self.base, self.latent.channels, self.patch_size)
        allowed = {**required, **model.extra_shapes(self.base)}
        linears = model.linears(self.base)
        missing = [key for key in required if key not in self.tensors]
        unknown = [key for key in self.tensors if key not in allowed]
        unknown += [f"{LORA_PREFIX}{path}" for path in self.lora if path not in linears]
        if missing or unknown:
            raise ValueError(f"not the tensors of a {self.backbone} adapter: {describe_keys(missing, unknown)}")
        for key, tensor in self.tensors.items():
            _check_tensor(key, tensor, allowed[key])
        for path, pair in self.lora.items():
            rank = pair.A.shape[0] if pair.A.ndim else 0
            outputs, inputs, *ones = linears[path]
            _check_tensor(f"{path} lora_A", pair.A, (rank, inputs, *ones))
            _check_tensor(f"{path} lora_B", pair.B, (outputs, rank, *ones))
            if rank < 1 or not -ALPHA_LIMIT <= pair.alpha <= ALPHA_LIMIT:
                raise ValueError(f"LoRA of {path}: rank {rank} and alpha {pair.alpha} are not a LoRA")


def save_adapter(path: str | os.PathLike[str], adapter: Adapter) -> None:
    """Check the adapter and write it atomically as .safetensors.

    ValueError when it is inconsistent, has a value that is not finite, or its metadata uses a reserved key.
    """
    check_name(path)
    adapter.check()
    tensors = _to_tensors(adapter)
    invalid = [key for key, tensor in tensors.items() if not files.is_finite(tensor)]
    if invalid:
        raise ValueError(f"{path}: not written, values are not finite in {', '.join(sorted(invalid)[:8])}")
    metadata = _to_metadata(adapter, Path(path).stem)
    with files.replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def check_name(path: str | os.PathLike[str]) -> None:
    """ValueError unless an adapter can be written to a file of this name."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: an adapter is a .safetensors file; give it that ending")


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read and check an adapter; FileNotFoundError or ValueError name the file, the problem and the remedy."""
    with files.opened(path) as file, files.naming(path):
        metadata = file.metadata() or {}
        files.entries(file)  # raises for types that torch lacks
        fields = _from_metadata(metadata, file.keys())
        try:
            tensors = {key: files.check_finite(file.get_tensor(key), key, path) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from error
        adapter = Adapter(**fields, **_from_tensors(tensors))
        adapter.check()
    return adapter


def check_model(adapter: Adapter, model: Model) -> None:
    """ValueError unless a model on disk is the base that the adapter was trained on."""
    path = str(model.tensors.path)
    adapter.check_base(model.signature, path)
    if model.latent is not None:
        adapter.check_base_latent(model.latent, path)
    adapter.check_weights(model.identity(), bits_of(model.tensors.dtype), path)


def merge(base: Mapping[str, Tensor], adapter: Adapter, strength: float = 1.0) -> dict[str, Tensor]:
    """Base weights (diffusers names) merged with the adapter: W + strength*(alpha/r) B@A in fp32, cast to W's dtype.

    Embedder and head are replaced at any strength; 0 is "alignment only". Unchanged tensors are shared with `base`.
    ValueError when a tensor that the adapter changes is not in `base` or has another shape.
    """
    replaced = _replaced_ends(base, adapter)
    added = [key for key in adapter.tensors if key not in base]
    missing = [f"{path}.weight" for path in adapter.lora if f"{path}.weight" not in base]
    missing += [key for key in added if not replaced]
    if missing:
        raise ValueError(
            f"the base lacks what this {adapter.backbone} adapter changes: {describe_keys(missing, [])}. Use the "
            "base it was trained on, with diffusers names (Backbone.to_diffusers)."
        )
    shared = {key: tensor for key, tensor in base.items() if not (replaced and key.startswith(replaced))}
    dtype = next(iter(base.values())).dtype
    merged = {key: merge_tensor(key, tensor, adapter, strength) for key, tensor in shared.items()}
    return merged | {key: adapter.tensors[key].to(dtype) for key in added}


def _replaced_ends(base: Mapping[str, Tensor], adapter: Adapter) -> tuple[str, ...]:
    """Prefixes of the base's embedder and head when the adapter's have other names: in some families the names depend
    on the patch size.
    """
    model = adapter.model
    if not model.matches(base):
        return ()
    old, new = model.ends(model.detect(base)), model.ends({**adapter.base, "patch_size": adapter.patch_size})
    return old.prefixes if old != new else ()


def merge_tensor(key: str, tensor: Tensor, adapter: Adapter, strength: float = 1.0) -> Tensor:
    """One tensor of merge(): the adapter's own, base + LoRA, or the base's unchanged."""
    if key in adapter.tensors:
        return adapter.tensors[key].to(tensor)
    pair = adapter.lora.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
    if pair is None or strength == 0:
        return tensor
    shape = (len(pair.B), *pair.A.shape[1:])
    if shape != tensor.shape:
        raise ValueError(f"{key}: the base has {tuple(tensor.shape)}, the adapter's LoRA {shape}")
    merged = torch.empty_like(tensor)
    rows = max(1, MERGED_VALUES // tensor[0].numel())
    for start in range(0, len(tensor), rows):  # in parts: the sum is in float32, often twice as large as the weights
        part = slice(start, start + rows)
        merged[part] = tensor[part].float() + pair.delta(strength, part.start, part.stop).to(tensor.device)
    return merged


def _to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = dict(adapter.tensors)
    for path, pair in adapter.lora.items():
        tensors[f"{LORA_PREFIX}{path}.lora_A.weight"] = pair.A
        tensors[f"{LORA_PREFIX}{path}.lora_B.weight"] = pair.B
        tensors[f"{LORA_PREFIX}{path}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
    return {key: _owned(tensor) for key, tensor in tensors.items()}


def _owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU with its own memory, as safetensors requires."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def _to_metadata(adapter: Adapter, title: str) -> dict[str, str]:
    reserved = [key for key in adapter.metadata if key in _RESERVED]
    if reserved:
        raise ValueError(f"metadata keys {', '.join(reserved)} are written from the adapter's fields; leave them out")
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{adapter.model.modelspec}/dc-gen",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        **{key: str(value) for key, value in adapter.metadata.items()},
        "dcgen.format": FORMAT,
        "dcgen.backbone": adapter.backbone,
        "dcgen.patch_size": str(adapter.patch_size),
        "dcgen.base": json.dumps(adapter.base, sort_keys=True),
        "dcgen.schedule": json.dumps(adapter.schedule.to_dict(), sort_keys=True),
        **adapter.latent.to_metadata(),
        **_base_metadata(adapter),
    }


def _base_metadata(adapter: Adapter) -> dict[str, str]:
    metadata = {}
    identities = {BASE_WEIGHTS: adapter.base_weights, UNMERGED_WEIGHTS: adapter.unmerged_weights}
    for key, identity in identities.items():
        if identity is not None and identity.values:
            metadata[key] = json.dumps(identity.to_dict(), sort_keys=True)
    if adapter.base_latent is not None:
        metadata[BASE_LATENT] = adapter.base_latent.to_metadata()[METADATA_KEY]
    return metadata


def _from_metadata(metadata: Mapping[str, str], keys: list[str]) -> dict[str, Any]:
    if "dcgen.format" not in metadata:
        raise ValueError(f"not a DC-Gen adapter (no dcgen.format in its metadata). {what_it_may_be(keys, REMEDY)}")
    if metadata["dcgen.format"] not in SUPPORTED:
        raise ValueError(
            f"adapter format {shown(metadata['dcgen.format'])}, this version of DC-Gen reads "
            f"{' and '.join(SUPPORTED)}: update DC-Gen"
        )
    missing = [key for key in _REQUIRED if key not in metadata]
    if missing:
        raise ValueError(f"damaged adapter, its metadata lacks {', '.join(missing)}: download it again")
    _backbone(metadata["dcgen.backbone"])
    size = metadata["dcgen.patch_size"]
    if not (size.isdecimal() and len(size) < 5):
        raise ValueError(f"dcgen.patch_size is {shown(size)}, not a whole number of latent pixels")
    return {
        "backbone": metadata["dcgen.backbone"],
        "latent": LatentSpace.from_metadata(metadata),
        "patch_size": int(size),
        "base": _json_object(metadata, "dcgen.base"),
        "schedule": _json_object(metadata, "dcgen.schedule"),
        "metadata": {key: value for key, value in metadata.items() if key not in _RESERVED},
        "base_weights": _identity(metadata, BASE_WEIGHTS),
        "unmerged_weights": _identity(metadata, UNMERGED_WEIGHTS),
        "base_latent": _base_latent(metadata) if BASE_LATENT in metadata else None,
    }


def _identity(metadata: Mapping[str, str], key: str) -> BaseIdentity | None:
    return BaseIdentity.parse(_json_object(metadata, key)) if key in metadata else None


def _base_latent(metadata: Mapping[str, str]) -> LatentSpace:
    with files.naming(BASE_LATENT):
        return LatentSpace.from_metadata({METADATA_KEY: metadata[BASE_LATENT]})


def _from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    own: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(LORA_PREFIX):
            own[key] = tensor
            continue
        suffix = next((suffix for suffix in _LORA_PARTS if key.endswith(suffix)), None)
        if suffix is None:
            raise ValueError(f"tensor {key} is not part of a LoRA ({', '.join(_LORA_PARTS)})")
        parts.setdefault(key[len(LORA_PREFIX) : -len(suffix)], {})[_LORA_PARTS[suffix]] = tensor
    for path, pair in parts.items():
        missing = [suffix for suffix, part in _LORA_PARTS.items() if part not in pair]
        if missing:
            raise ValueError(
                f"LoRA of {path} is incomplete: no {', '.join(missing)}. The file was not written by DC-Gen"
            )
        if pair["alpha"].numel() != 1 or pair["alpha"].is_complex():
            raise ValueError(f"LoRA of {path}: alpha must be one number, got shape {tuple(pair['alpha'].shape)}")
    lora = {path: LoraPair(pair["A"], pair["B"], float(pair["alpha"])) for path, pair in parts.items()}
    return {"tensors": own, "lora": lora}


def _json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        return parse_object(metadata[key], key)
    except ValueError as error:
        raise ValueError(f"damaged adapter, {key} is not a JSON object ({error}): download it again") from error


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating point {shape}")


def _backbone(name: str) -> Backbone:
    if name not in BACKBONES:
        raise ValueError(
            f"backbone {name!r} is unknown to this version of DC-Gen (known: {', '.join(BACKBONES)}): update it"
        )
    return BACKBONES[name]


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value after a JSON round trip: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return plain

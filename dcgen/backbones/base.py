# C latent channels, p patch size, D width, f spatial factor
"""The file formats of a base model: names, shapes, config. One subclass per family, one module per subclass.

train/families says how a family's network is called and trained, nodes/bridge/families how ComfyUI runs it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..fields import Check, check_fields, flag, optional, real, whole
from ..latent import LatentSpace
from ..schedule import Schedule
from .keymap import MAX_BLOCKS, KeyMap, Rule, count_blocks, strip_prefix

Config = dict[str, Any]
T = TypeVar("T")
SIZE = whole(1, 1 << 17)  # of a dimension of a tensor
HEADS = whole(1, 1024)
PATCH = whole(1, 64)
BLOCKS = whole(0, MAX_BLOCKS - 1)
# Config fields that several backbones have.
FIELDS: dict[str, Check] = {
    "width": SIZE,
    "in_channels": SIZE,
    "out_channels": optional(SIZE),
    "num_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "attention_head_dim": SIZE,
    "attention_bias": flag,
    "patch_size": PATCH,
    "sample_size": SIZE,
    "dropout": real(0, 1),
    "norm_eps": real(1e-12, 1),
    "guidance_embeds": flag,
    "learned_sigma": flag,
}


@dataclass(frozen=True)
class Ends:
    """The two layers that depend on the latent, by module path in the diffusers network.

    named: layers around the head whose names, but not their shapes, depend on the patch size; they train with the head,
    from the base's values.
    """

    embedder: str
    head: str
    named: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter((self.embedder, self.head))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names of all their tensors."""
        return tuple(f"{layer}." for layer in self.trained)

    @property
    def trained(self) -> tuple[str, ...]:
        """All layers that train besides LoRA."""
        return self.embedder, self.head, *self.named


@dataclass(frozen=True)
class NunchakuLayer:
    """A layer of nunchaku's network in a block: its name there, and the diffusers layers that are joined in it.

    columns: of the joined weight, in units of the width (the last None = to the end); bias: whether the layer has the
    bias of its parts; shifted: its inputs come from a GELU, which int4 kernels shift to be positive; splits: of a
    modulation layer, the number of its outputs per channel.
    """

    name: str
    parts: tuple[str, ...]
    columns: tuple[int, int | None] = (0, None)
    bias: bool = True
    shifted: bool = False
    splits: int = 0


class Backbone(ABC):
    """A family of base models on disk: its embedder and head, and the names and shapes of its tensors.

    Configs are the config.json of the diffusers class.
    """

    name: str
    title: ClassVar[str]
    """Its name in messages."""
    diffusers_class: str
    modelspec: str
    keys: KeyMap
    prefixes: tuple[str, ...] = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.")
    original_signature: tuple[str, ...]
    diffusers_signature: tuple[str, ...]
    """Keys in either naming; a state dict with all keys of one of them belongs to this family."""
    probes: ClassVar[Mapping[str, tuple[str, str, int]]]
    """Numbers that are read from tensor shapes: field -> (diffusers tensor, original tensor, dimension)."""
    stacks: ClassVar[Mapping[str, tuple[str, str, str]]]
    """Lists of blocks in execution order: kind in `keys` -> (config field with their number, both names)."""
    extras: tuple[str, ...] = ()
    """Trained tensors of original files without a diffusers name; kept when original names are written."""
    signature_fields: tuple[str, ...]
    """Config fields that, besides the width, must agree for two models to take the same adapter."""
    identity_layers: ClassVar[Mapping[str, str]]
    """Kind of block in `stacks` -> a layer in it that every DC-Gen LoRA changes; see dcgen.identity."""
    modulation: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Kind of block in `stacks` -> its layers with one output for all tokens (AdaLN), quantized to at least 8 bits."""
    original_network: bool = True
    """Whether ComfyUI's network has the original key names of the files, rather than diffusers'."""
    nunchaku: ClassVar[Mapping[str, tuple[NunchakuLayer, ...]]] = {}
    """Kind of block in `stacks` -> its layers in nunchaku's files; empty when nunchaku does not run the family."""
    nunchaku_class: str = ""
    """The class of nunchaku's network."""
    gguf_architecture: str = ""
    """general.architecture of its GGUF files; "" when no loader of GGUF files knows the family."""
    base_spatial_factor: int | None = None
    """f of the published bases' latents; None if they differ."""
    temporal_patch: int = 1
    end_bias: bool = True
    """Whether embedder and head have a bias."""
    fields: ClassVar[Mapping[str, Check]] = FIELDS
    """Allowed values of the config fields that are read."""
    needed_fields: tuple[str, ...]
    """Config fields that are required to know the shapes."""
    extra_signature_fields: tuple[str, ...] = ()
    """Fields of the base signature besides the width and signature_fields."""

    @abstractmethod
    def ends(self, config: Mapping[str, Any]) -> Ends:
        """Patch embedder and output head of a model with this config, or with this base signature and patch_size."""

    def comfy_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """ComfyUI's description of a base with this config, which ComfyUI-nunchaku reads from its files."""
        raise NotImplementedError(f"ComfyUI-nunchaku runs no {self.title} model")

    @abstractmethod
    def config_with_latent(self, config: Config, channels: int, patch_size: int = 1) -> Config:
        """The config of the same network on a latent of `channels` channels with patches of `patch_size`."""

    def base_signature(self, config: Config) -> dict[str, Any]:
        """The parts of the config that do not depend on the latent; models with equal ones take the same adapters."""
        return {"width": self.width(config), **{field: config[field] for field in self.signature_fields}}

    def check_config(self, config: Mapping[str, Any]) -> None:
        """ValueError that names the first invalid field."""
        check_fields(config, self.fields, self.needed_fields)

    def check_base_signature(self, base: Mapping[str, Any]) -> None:
        """ValueError unless this is a base signature of this family."""
        try:
            check_fields(base, self.fields, ("width", *self.signature_fields, *self.extra_signature_fields))
        except ValueError as error:
            raise ValueError(f"the base signature is not one of a {self.name} model: {error}") from error

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that a model with this (checked) config can have, by diffusers name."""
        shapes = self.end_shapes(config)
        for path, shape in self.linears(self.base_signature(dict(config))).items():
            shapes |= {f"{path}.weight": shape, f"{path}.bias": shape[:1]}
        return shapes | self.other_shapes(config)

    def end_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of embedder and head on the config's latent."""
        p, channels = config["patch_size"], config["in_channels"]
        outputs = (config.get("out_channels") or channels) * p * p
        return self._end_shapes(self.ends(config), self.width(config), channels, p, outputs)

    def latent_shapes(self, base: Mapping[str, Any], channels: int, patch_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of embedder and head, by name, of a base with this signature on another latent."""
        outputs = channels * patch_size**2 * (2 if base.get("learned_sigma") else 1)
        ends = self.ends({**base, "patch_size": patch_size})
        return self._end_shapes(ends, base["width"], channels, patch_size, outputs)

    def _end_shapes(self, ends: Ends, width: int, channels: int, p: int, outputs: int) -> dict[str, tuple[int, ...]]:
        weights = {
            f"{ends.embedder}.weight": self.embedder_shape(width, channels, p),
            f"{ends.head}.weight": (outputs, width),
        }
        biases = {f"{ends.embedder}.bias": (width,), f"{ends.head}.bias": (outputs,)}
        return {**weights, **biases} if self.end_bias else weights

    def embedder_shape(self, width: int, channels: int, p: int) -> tuple[int, ...]:
        """Shape of the embedder's weight, by default a convolution over patches."""
        return width, channels, p, p

    def other_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are not in embedder, head or linears(): norms, tables, spatial convolutions."""
        others = self.others(config)
        shapes = dict(others.get("", {}))
        for kind, (field, name, _) in self.stacks.items():
            for i in range(config[field]):
                shapes |= {f"{name}.{i}.{tensor}": shape for tensor, shape in others.get(kind, {}).items()}
        return shapes

    @abstractmethod
    def others(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """As other_shapes, for one block of each kind in `stacks`, and under "" for the tensors outside of blocks."""

    @abstractmethod
    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Tensors that an adapter may replace besides embedder and head: the norm or modulation before the head."""

    @abstractmethod
    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """As linears, for one block of each kind in `stacks`, and under "" for the layers outside of blocks."""

    def linears(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Weight shape of every layer that can have a LoRA, by module path, for a base with this signature.

        (out, in) of a Linear, (out, in, 1, 1) of a 1x1 convolution.
        """
        layers = self.layers(base)
        shapes = dict(layers[""])
        for kind, (field, name, _) in self.stacks.items():
            for i in range(base[field]):
                shapes |= {f"{name}.{i}.{layer}": shape for layer, shape in layers[kind].items()}
        return shapes

    def matches(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether the keys look like this family, in either naming (a quick check; detect() checks in full)."""
        keys = self.bare_keys(state_dict)
        return any(all(key in keys for key in names) for names in (self.original_signature, self.diffusers_signature))

    @abstractmethod
    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        """The config, from tensor shapes in either naming (meta tensors suffice); ValueError names what is missing."""

    def read(self, keys: Mapping[str, Tensor]) -> dict[str, int]:
        """The number of each probe and the number of blocks, by config field; keys without prefix."""
        original = self.is_original(keys)
        values = {field: count_blocks(keys, f"{names[original]}.") for field, *names in self.stacks.values()}
        for field, (diffusers_key, original_key, dim) in self.probes.items():
            key = original_key if original else diffusers_key
            if key not in keys:
                raise ValueError(f"this is not a {self.keys.model} state dict: it has no {key}")
            values[field] = dimension(keys[key], dim, key)
        return values

    def read_values(self, names: Mapping[str, Any], get: Callable[[str], Tensor]) -> Config:
        """Config fields that depend on a tensor's values. names: keys without prefix; get: a tensor by such a key."""
        return {}

    def depths(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Number of blocks of each kind, by the kinds of `keys`."""
        return {kind: config[field] for kind, (field, _, _) in self.stacks.items()}

    def width(self, config: Mapping[str, Any]) -> int:
        """D, the hidden size."""
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    def packed_channels(self, config: Mapping[str, Any]) -> int:
        """Values per token: C * p * p."""
        return int(config["in_channels"] * config.get("patch_size", 1) ** 2)

    def patch_size(self, config: Mapping[str, Any], latent: LatentSpace, what: str) -> int:
        """p, latent pixels along a side of a token; ValueError, naming `what`, when none fits the latent's channels."""
        return patch_size(self.packed_channels(config), latent.channels, what)

    @abstractmethod
    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> Schedule:
        """The schedule of the published models on this latent, for files that do not name one."""

    def identity_names(self, base: Mapping[str, Any]) -> list[str]:
        """Weights, by diffusers name, that identify a base among those with the same signature."""
        names = []
        for kind, layer in self.identity_layers.items():
            field, path, _ = self.stacks[kind]
            last = base[field] - 1
            names += [f"{path}.{i}.{layer}.weight" for i in sorted({0, last // 2, last}) if i >= 0]
        return names

    def rule_of(self, name: str, config: Mapping[str, Any]) -> Rule:
        """The key map rule for a tensor, by diffusers name; KeyError for an unknown name."""
        for rule in self.key_map(config).rules(self.depths(config)):
            if name in rule.parts:
                return rule
        raise KeyError(name)

    def key_map(self, config: Mapping[str, Any]) -> KeyMap:
        """The key map of the variant that the config describes."""
        return self.keys

    def bare_keys(self, state_dict: Mapping[str, T]) -> Mapping[str, T]:
        """The state dict without the prefix that some files put before every key."""
        return strip_prefix(state_dict, self.prefixes)

    def is_original(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether keys (without prefix) are the original ones rather than diffusers'."""
        return all(key in state_dict for key in self.original_signature)

    def to_original(
        self, state_dict: Mapping[str, Tensor], config: Config | None = None, *, partial: bool = False
    ) -> dict[str, Tensor]:
        """Diffusers names -> original names, bit-exact. partial: only some tensors (an adapter's).

        config is detected from the tensors when it is not given. ValueError lists missing and unknown keys.
        """
        keys = self.bare_keys(state_dict)
        config = config or self.detect(keys)
        return self.key_map(config).to_original(keys, self.depths(config), partial=partial)

    def to_diffusers(
        self, state_dict: Mapping[str, Tensor], config: Config | None = None, *, partial: bool = False
    ) -> dict[str, Tensor]:
        """Original names -> diffusers names, bit-exact; tensors are views. Arguments and errors as in to_original."""
        keys = self.bare_keys(state_dict)
        config = config or self.detect(keys)
        return self.key_map(config).to_diffusers(keys, self.depths(config), self.width(config), partial=partial)

    def tokens(self, height_px: int, width_px: int, f: int, p: int = 1) -> int:
        """Tokens of an image: (H / fp) * (W / fp), arXiv:2509.25180 section 3.1.1; sizes must be multiples of fp."""
        side = f * p
        if height_px < side or width_px < side or height_px % side or width_px % side:
            raise ValueError(f"{width_px}x{height_px} pixels at f{f}p{p}: both sides must be multiples of {side}")
        return (height_px // side) * (width_px // side)


def dimension(tensor: Tensor, dim: int, key: str) -> int:
    """Size of one dimension of a tensor; ValueError when it is missing or 0."""
    if tensor.ndim <= dim or tensor.shape[dim] < 1:
        raise ValueError(
            f"{key} has shape {tuple(tensor.shape)}, expected more dimensions or values: the file is damaged"
        )
    return tensor.shape[dim]


def patch_size(packed_channels: int, channels: int, what: str) -> int:
    """p with channels * p*p == packed_channels; ValueError when there is none: the latent is for another model."""
    size = math.isqrt(packed_channels // channels) if channels and packed_channels % channels == 0 else 0
    if not size or channels * size * size != packed_channels:
        raise ValueError(
            f"{what} takes {packed_channels} values per token, which a latent of {channels} channels cannot fill at "
            "any patch size: the latent belongs to another autoencoder than the model."
        )
    return size

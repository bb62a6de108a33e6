"""What training needs to know of a family of base models, beside its file formats. One subclass a family."""
# B batch, C latent channels, h w latent rows and columns, p patch size, D width, T text tokens

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from dcgen.backbones import Backbone, Config
from train.conditioning import Cond, CondField, ragged_text

if TYPE_CHECKING:
    from train.autoencoders import Autoencoder
    from train.toy.releases import ToyLabels, ToyText

RawOutput = Callable[[Tensor, Tensor, Cond], Tensor]


class TextEncoder(Protocol):
    """Captions -> the caption fields of the conditioning, (B,...) float32 on the encoder's device."""

    def __call__(self, captions: Sequence[str]) -> Cond: ...


@dataclass(frozen=True)
class Architecture:
    """A published base model, for planning a run before anything is downloaded; from its config.json."""

    config: Config
    latent: str
    patch_size: int
    text: tuple[int, int] = (0, 0)  # tokens, width


@dataclass(frozen=True)
class TinyRelease:
    """A random release of a few kilobytes in the diffusers layout: its classes, and what makes its parts."""

    pipeline: str
    config: Config
    autoencoder: Callable[[], Any]
    scheduler: tuple[str, dict[str, Any]]
    # class of each text encoder -> what writes it and its tokenizer into two folders
    text: Mapping[str, Callable[[Path, Path], None]] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)  # further entries of model_index.json
    # changes the network before it is saved
    settle: Callable[[nn.Module], None] = lambda network: None


class Family(ABC):
    """A family as training sees it: how the network is called, what trains, and how its conditioning is made.

    Models are modules with the diffusers class's signature; they may be peft-injected or sharded, so nothing here looks
    at more than named children and `config`.
    """

    backbone: ClassVar[Backbone]
    lora_targets: ClassVar[tuple[str, ...]]
    """Regular expressions on whole module paths, joined by | for peft's target_modules."""
    fields: ClassVar[Mapping[str, CondField]]
    """The conditioning that velocity() takes, by name."""
    architectures: ClassVar[Mapping[str, Architecture]] = {}
    text_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Folders of a release that make the conditioning -> the transformers classes that it may name for each."""
    token_layers: ClassVar[Mapping[str, str]] = {}
    """What passes through a layer, if not the image's tokens alone: "text", "joint" (image and text) or "sample" (one
    vector an image) -> regular expression on whole module paths. For the cost that --dry-run prints."""
    output_sign: ClassVar[int] = 1
    """The velocity is this times what the network gives."""
    toy_text: ClassVar[ToyText | None] = None
    """How the toy makes a base of this family from text, and one from class labels; None = it does not."""
    toy_labels: ClassVar[ToyLabels | None] = None

    ragged: ClassVar[Mapping[str, str]]
    """Ragged text field -> its mask field: told by `fields`."""

    def __init_subclass__(cls) -> None:
        if "fields" in cls.__dict__:
            cls.ragged = ragged_text(cls.fields)

    @abstractmethod
    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        """Patch embedding (B,h/p,w/p,D) of model-space latents (B,C,h,w): what Eq. 1 compares."""

    def patches(self, latents: Tensor, p: int) -> Tensor:
        """Latents (B,C,h*p,w*p) as patches (B,h,w,C*p*p), in the order in which the embedder takes them."""
        return rearrange(latents, "B C (h ph) (w pw) -> B h w (C ph pw)", ph=p, pw=p)

    @abstractmethod
    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity noise - x0 (B,C,h,w) at noised model-space latents (B,C,h,w) and sigma (B,) in 0..1."""

    @abstractmethod
    def text_encoder(
        self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
    ) -> TextEncoder:
        """What makes the conditioning of captions as the base's own pipeline does, from a release folder.

        tokens: length of the text; None = the release's own.
        """

    @abstractmethod
    def tiny(self, guidance_embeds: bool) -> TinyRelease:
        """A random release for tests and the tiny recipe."""

    def network_class(self) -> Any:
        """The network's class: the one of that name in diffusers, or another with its from_config and signature."""
        import diffusers

        return getattr(diffusers, self.backbone.diffusers_class)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks in the order they run: units of sharding and checkpointing."""
        return [block for _, name, _ in self.backbone.stacks.values() for block in child(model, name)]

    def image_tokens(self, output: Any, grid: tuple[int, int]) -> Tensor:
        """The image's tokens (B,h,w,D) in what a block gives; here the last of its outputs, behind any text."""
        tokens = output[-1] if isinstance(output, tuple) else output
        return tokens[:, -grid[0] * grid[1] :].unflatten(1, grid)

    def is_lora_target(self, path: str) -> bool:
        """Whether the module at this path (no prefix) gets a LoRA: lora_targets match whole paths."""
        return any(re.fullmatch(target, path) for target in self.lora_targets)

    def tokens_of(self, path: str) -> str:
        """What passes through the layer at this path: a key of token_layers, or "image"."""
        return next((kind for kind, pattern in self.token_layers.items() if re.fullmatch(pattern, path)), "image")

    def attention_flops(self, config: Mapping[str, Any], image: int, text: int) -> float:
        """FLOPs of one image's attention products (not the projections) in a forward pass, from its tokens.

        Here every image token looks at every other in each block.
        """
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return 4.0 * config["num_layers"] * width * image**2

    def sample_conditioning(self, images: Tensor, autoencoder: Autoencoder) -> Cond:
        """The fields that belong to samples, (B,...), of images (B,3,H,W) in -1..1; none unless `fields` has some.

        autoencoder: that of the latents which train: the base's own, or the new one.
        """
        return {}

    def raw_output(self, model: nn.Module, x: Tensor, step: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """What a network trained by DDPM gives for latents (B,C,h,w) at whole steps (B,): noise, then any variance."""
        raise NotImplementedError(f"{self.backbone.title} was not trained by DDPM")

    @property
    def denoises(self) -> bool:
        """Whether the family was trained by DDPM, so that objective.loss: ddpm applies."""
        return type(self).raw_output is not Family.raw_output

    def prepare(self, model: nn.Module) -> nn.Module:
        """A network just loaded, ready for training: without randomness of its own."""
        return model


def bare(model: nn.Module) -> nn.Module:
    """The module under DistributedDataParallel or torch.compile, for reading attributes (not for calling)."""
    for wrapper in ("module", "_orig_mod"):
        inner = getattr(model, wrapper, None)
        if isinstance(inner, nn.Module):
            return bare(inner)
    return model


def model_config(model: nn.Module) -> Config:
    """The diffusers config that the model carries, wrapped or not."""
    config: Any = bare(model).config
    return config


def child(model: nn.Module, path: str) -> Any:
    """Submodule by dotted path, through wrappers that forward attributes (PeftModel, DDP, torch.compile)."""
    module: Any = bare(model)
    for name in path.split("."):
        module = getattr(module, name)
    return module

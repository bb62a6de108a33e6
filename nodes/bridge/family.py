# C latent channels, p patch size
"""What ComfyUI needs to know about a family of base models besides its file formats. One subclass per family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import comfy.model_base
import comfy.sd
from torch import Tensor, nn

from ...dcgen.backbones import Backbone, Config
from ...dcgen.folder import Release
from .latent_format import ModelInfo


class Family(ABC):
    """A family in ComfyUI: how to recognise, configure and build its network, and how to load its text encoder.

    Configs are those of the diffusers class, as far as the network shows them.
    """

    backbone: ClassVar[Backbone]
    text_node: ClassVar[str]
    """The node that encodes a prompt for this family, for messages."""

    @property
    def original_names(self) -> bool:
        """Whether ComfyUI's network uses the original key names of the files, rather than diffusers'."""
        return self.backbone.original_network

    @abstractmethod
    def recognises(self, model: comfy.model_base.BaseModel) -> bool:
        """Whether a model with ComfyUI's own layers is of this family, whichever loader made it."""

    @abstractmethod
    def config(self, network: nn.Module) -> Config:
        """The config of such a network, without the fields that depend on the latent."""

    @abstractmethod
    def model_config(self, shapes: Mapping[str, Tensor], config: Config) -> Any:
        """Core's model_config for weights with these shapes, by the network's names; None when core has none."""

    @abstractmethod
    def unet_config(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        """The entries of core's unet_config that depend on the config and the latent."""

    @abstractmethod
    def attributes(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        """Plain attributes of the network that depend on the latent. config: of the model on that latent."""

    @abstractmethod
    def memory_factor(self, model: comfy.model_base.BaseModel, config: Config, info: ModelInfo) -> float:
        """Core's memory_usage_factor on this latent: its estimate counts latent pixels, not tokens."""

    @abstractmethod
    def text_width(self, config: Config) -> int:
        """Channels of the text features that the network takes."""

    @abstractmethod
    def load_text(self, release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
        """CLIP of a release folder that encodes like the release's diffusers pipeline."""

    def renamed(self, part: dict[str, Tensor], model_config: Any) -> dict[str, Tensor]:
        """Tensors of a layer with the names and shapes of the network."""
        return part

    def prepare(self, model: comfy.model_base.BaseModel) -> None:  # noqa: B027  most families change nothing
        """Change a model before its weights are loaded."""

    def check_text(self, text: Tensor, cond: Mapping[str, Any], made_by: str | None, config: Config) -> None:
        """ValueError when a conditioning (text (B,T,D) and its dict) is not for this family.

        made_by: the family that one of our nodes encoded it for; None for any other node.
        """
        if made_by is not None and made_by != self.backbone.name:
            raise ValueError(
                f"this conditioning was encoded for {made_by.upper()}, and the model is a {self.backbone.title}. "
                f"Encode the prompt with the model's own text encoder ({self.text_node})."
            )
        if text.shape[-1] != self.text_width(config):
            raise ValueError(
                f"this conditioning has text features of {text.shape[-1]} channels, from another text encoder than the "
                f"model's, which has {self.text_width(config)}. Encode the prompt with the model's own "
                f"({self.text_node})."
            )

    def network_layers(self, config: Config) -> dict[str, str]:
        """Layers of ComfyUI's network that depend on the latent -> their names in LoRA files (diffusers')."""
        names = self.backbone.extra_shapes(self.backbone.base_signature(config))
        layers = [*self.backbone.ends(config), *dict.fromkeys(name.rpartition(".")[0] for name in names)]
        return {self.network_name(layer, config): layer for layer in layers if layer}

    def network_name(self, layer: str, config: Config) -> str:
        """Name in ComfyUI's network of a layer that exists in both namings, by diffusers name."""
        if not self.original_names:
            return layer
        return self.backbone.rule_of(f"{layer}.weight", config).original.removesuffix(".weight")

"""What depends on the loader of the base. One subclass per loader; each works with every family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from comfy.model_patcher import ModelPatcher as Patcher
from torch import Tensor

from ...dcgen.adapter import Adapter
from ...dcgen.backbones import Config
from ...dcgen.identity import BaseIdentity, identity_of
from .family import Family
from .latent_format import FamilyInfo


class Host(ABC):
    """The MODELs of one loader: how to read their config and weights, and how to apply an adapter to them."""

    order: ClassVar[int] = 0
    """The host with the highest order is tried first; core's, which accepts any MODEL, is last."""

    @abstractmethod
    def recognises(self, model: Patcher) -> bool:
        """Whether this loader made the MODEL."""

    @abstractmethod
    def family(self, model: Patcher) -> Family:
        """The family of its network; ValueError when it is not supported."""

    @abstractmethod
    def config(self, model: Patcher, family: Family) -> Config:
        """The diffusers config of its network, without the fields that depend on the latent."""

    @abstractmethod
    def weight(self, model: Patcher, family: Family, config: Config, name: str) -> tuple[Tensor, float] | None:
        """(weight by diffusers name as loaded, without LoRA, bits per stored value); None when it cannot be read."""

    @abstractmethod
    def apply(self, model: Patcher, family: Family, adapter: Adapter, info: FamilyInfo, strength: float) -> Patcher:
        """The DC-Gen MODEL on `model`'s blocks, with the adapter's LoRA at `strength`; not yet guarded."""

    def identity(self, model: Patcher, family: Family, config: Config) -> tuple[BaseIdentity, int]:
        """(identity of the MODEL's base weights, bits per value: 4, 8 or 16)."""
        bits: list[float] = []

        def get(name: str) -> Tensor | None:
            loaded = self.weight(model, family, config, name)
            if loaded is None:
                return None
            bits.append(loaded[1])
            return loaded[0]

        identity = identity_of(family.backbone, family.backbone.base_signature(config), get)
        fewest = min(bits, default=16)
        return identity, 4 if fewest < 7 else 8 if fewest < 12 else 16


__all__ = ["Host", "Patcher"]

"""What differs by who loaded the base. One subclass a loader; each works with every family."""

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
    """A loader's MODELs: how their config and weights are read, and how an adapter goes on them."""

    order: ClassVar[int] = 0
    """Hosts are asked from the highest down; the core's, which takes any MODEL, is the last."""

    @abstractmethod
    def recognises(self, model: Patcher) -> bool:
        """Whether this loader made the MODEL."""

    @abstractmethod
    def family(self, model: Patcher) -> Family:
        """The family of its network; ValueError when that is none of ours."""

    @abstractmethod
    def config(self, model: Patcher, family: Family) -> Config:
        """The diffusers config of its network, as far as the latent does not matter."""

    @abstractmethod
    def weight(self, model: Patcher, family: Family, config: Config, name: str) -> tuple[Tensor, float] | None:
        """A weight as it was loaded, by diffusers name, without LoRA, and the bits of a stored value; None where it
        cannot be read.
        """

    @abstractmethod
    def apply(self, model: Patcher, family: Family, adapter: Adapter, info: FamilyInfo, strength: float) -> Patcher:
        """The DC-Gen MODEL over `model`'s blocks, with the adapter's LoRA at `strength`; not finished."""

    def identity(self, model: Patcher, family: Family, config: Config) -> tuple[BaseIdentity, int]:
        """Which base's weights the MODEL has, and the bits of a value: 4, 8 or 16."""
        bits: list[float] = []

        def get(name: str) -> Tensor | None:
            read = self.weight(model, family, config, name)
            if read is None:
                return None
            bits.append(read[1])
            return read[0]

        identity = identity_of(family.backbone, family.backbone.base_signature(config), get)
        fewest = min(bits, default=16)
        return identity, 4 if fewest < 7 else 8 if fewest < 12 else 16


__all__ = ["Host", "Patcher"]

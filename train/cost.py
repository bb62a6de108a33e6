"""FLOPs of a training stage from shapes, and GPU-hours from them. Estimates: nothing here is measured."""
# N image tokens, T text tokens

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from train.family import Family

MFU = 0.35  # assumed share of a card's peak that training reaches


@dataclass(frozen=True)
class Card:
    """A GPU: dense bf16 peak with float32 accumulation (TFLOP/s) and memory (GB), from its maker's data sheet."""

    peak: float
    memory: int


CARDS = {
    "RTX 4090": Card(165.2, 24),
    "RTX 5090": Card(209.5, 32),
    "A100": Card(312.0, 80),
    "H100": Card(989.4, 80),  # SXM
}


@dataclass(frozen=True)
class Work:
    """FLOPs of one forward pass of one image, by what they are spent on; a multiply-add counts as two."""

    layers: float  # the network's own weights
    attention: float  # products of queries, keys and values
    lora: float = 0.0
    ends: float = 0.0  # embedder and head; these are part of `layers` too

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass."""
        return self.layers + self.attention + self.lora

    def backward(self, full: bool) -> float:
        """FLOPs of a backward pass: to every activation, and to the weights that train (`full`: all of them).

        Attention multiplies two activations, and a LoRA's weights all train: both cost twice their forward pass.
        """
        return self.layers + 2 * self.attention + 2 * self.lora + (self.layers if full else self.ends)


def forward_work(
    family: Family, model: nn.Module, config: Mapping[str, Any], tokens: tuple[int, int], rank: int = 0
) -> Work:
    """Work of one image of (image, text) tokens through a network, which may be on the meta device."""
    image, text = tokens
    count = {"image": image, "text": text, "joint": image + text, "sample": 1}
    ends = family.backbone.ends(dict(config))
    layers = lora = trained = 0.0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim < 2 or isinstance(module, nn.Embedding):
            continue
        times = 2 * count[family.tokens_of(name)]
        layers += times * weight.numel()
        if name.startswith(tuple(ends)):
            trained += times * weight.numel()
        if family.is_lora_target(name):
            lora += times * rank * (weight.shape[0] + weight[0].numel())
    return Work(layers, family.attention_flops(config, image, text), lora, trained)


def sample_flops(
    work: Work, *, full: bool = False, checkpointing: bool = False, uncond: float = 0.0, uncond_grad: bool = True
) -> float:
    """FLOPs of one image in one training step.

    checkpointing: every block's forward pass runs again in the backward pass. uncond: share of the images that go
    through the second branch of Eq. 7, the empty prompt, with its own backward pass if uncond_grad.
    """
    branch = work.forward * (2 if checkpointing else 1) + work.backward(full)
    return branch + uncond * (branch if uncond_grad else work.forward)


def lora_step_flops(
    family: Family, model: nn.Module, config: Mapping[str, Any], tokens: tuple[int, int], rank: int
) -> float:
    """FLOPs of one image of (image, text) tokens in a step that trains LoRA alone, nothing recomputed: those of MFU.

    model: the network without LoRA, which may be on the meta device.
    """
    work = forward_work(family, model, config, tokens, rank)
    return work.forward + replace(work, ends=0.0).backward(full=False)


def gpu_hours(flops: float, card: Card, mfu: float = MFU) -> float:
    """Hours that one such card needs for these FLOPs."""
    return flops / (card.peak * 1e12 * mfu) / 3600


def hours_line(flops: float, gigabytes: float = 0.0) -> str:
    """GPU-hours of these FLOPs on each card; a card with less memory than these GB a rank is marked."""
    parts = []
    for name, card in CARDS.items():
        small = f" ({card.memory} GB: too small)" if gigabytes > card.memory else ""
        parts.append(f"{name} {number(gpu_hours(flops, card))}{small}")
    return f"GPU-hours, estimate at {MFU:.0%} MFU, not measured: {', '.join(parts)}"


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

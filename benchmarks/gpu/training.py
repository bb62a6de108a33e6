"""A LoRA training step at FLUX's width with fewer blocks: tokens a second, model FLOP utilisation, memory."""

# B batch, N image tokens, T text tokens, D width

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.report import Job, Row
from train.families import ARCHITECTURES
from train.lora import inject_lora

PART = "training"
BLOCKS = (2, 4)
NARROW = {"num_attention_heads": 2, "attention_head_dim": 128}


def jobs(device: Device) -> list[Job]:
    return [
        Job(PART, "LoRA step, eager", 25, lambda at: step(at, compiled=False)),
        Job(PART, "LoRA step, compiled by block", 70, lambda at: step(at, compiled=True)),
    ]


def step(device: Device, compiled: bool) -> Iterator[Row]:
    """Forward and backward of FLUX, 2 double and 4 single blocks, rank 256, 1,024 image and 512 text tokens."""
    batch, side, text, rank = (1, 4, 8, 4) if device.small else (4, 32, 512, 256)
    flux, published = ARCHITECTURES["dc-gen-flux-f32"]
    double, single = BLOCKS
    config = {**published.config, "num_layers": double, "num_single_layers": single}
    if device.small:
        config |= NARROW
    with torch.device(device.kind):
        model = flux.network_class().from_config(config).to(device.dtype).requires_grad_(False)
    inject_lora(model, flux, rank, float(rank), seed=0)
    model.to(device.kind)
    if compiled:
        for block in flux.blocks(model):
            block.compile(backend="aot_eager" if device.small else "inductor", fullgraph=True)
    x, sigma = torch.randn(batch, 32, side, side, device=device.kind), torch.rand(batch, device=device.kind)
    cond = {
        "prompt_embeds": torch.randn(batch, text, config["joint_attention_dim"], device=device.kind),
        "pooled": torch.randn(batch, config["pooled_projection_dim"], device=device.kind),
    }
    scale = torch.full((batch,), 3.5, device=device.kind)

    def loss() -> Tensor:
        with torch.autocast(device.kind, device.dtype):
            return flux.velocity(model, x, sigma, cond, scale).float().square().mean()

    def call() -> None:
        loss().backward()

    call()
    ms, gib = device.milliseconds(call), device.peak_gib(call)
    flops = operations(config, model, batch, side**2 + text)
    finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    how = "compiled by block" if compiled else "eager"
    yield Row(
        PART, f"FLUX {double}+{single} blocks, LoRA r={rank}, {how}", ok=finite, ms=ms, gib=gib,
        roof=device.roof(flops, ms), note=f"{batch * side**2 / ms * 1000:.0f} image tokens/s; roof is the MFU",
    )  # fmt: skip


def operations(config: dict[str, Any], model: torch.nn.Module, batch: int, tokens: int) -> int:
    """Model operations of a step: forward, and the gradient of the activations (frozen weights need no other)."""
    linear = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and _counts(name))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    attention = 2 * sum(BLOCKS) * tokens * width
    return int(4 * batch * tokens * (linear + attention))


def _counts(name: str) -> bool:
    """Whether a weight multiplies every token: not the modulation's, and LoRA is left out of model operations."""
    return "blocks." in name and "lora" not in name and "norm" not in name

"""The FLOPs that benchmarks.train divides by for MFU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train import lora_step_flops
from train.families import FAMILIES
from train.lora import inject_lora


def test_mfu_counts_the_flops_that_pytorch_counts():
    """Where most weights are in double blocks, each of whose streams only its own tokens pass."""
    flux = FAMILIES["flux"]
    config = {**flux.tiny(True).config, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 8}
    bare = flux.network_class().from_config(config)
    model = flux.network_class().from_config(config).requires_grad_(False)
    inject_lora(model, flux, 8, 8.0, seed=0)
    x, sigma, scale = torch.randn(1, config["in_channels"], 8, 8), torch.full((1,), 0.5), torch.ones(1)
    cond = {
        "prompt_embeds": torch.randn(1, 40, config["joint_attention_dim"]),
        "pooled": torch.randn(1, config["pooled_projection_dim"]),
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        flux.velocity(model, x, sigma, cond, scale).sum().backward()
    assert lora_step_flops(flux, bare, config, (64, 40), 8) == pytest.approx(counter.get_total_flops(), rel=0.06)

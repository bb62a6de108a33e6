"""Fixtures of the core tests: tiny random models, one thread."""

from __future__ import annotations

import pytest
import torch

FLUX_TINY = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 12,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_flux():
    """make(**config) -> random FluxTransformer2DModel in eval mode; every parameter drawn, norms included."""
    diffusers = pytest.importorskip("diffusers")

    def make(seed: int = 0, **config):
        torch.manual_seed(seed)
        model = diffusers.FluxTransformer2DModel(**{**FLUX_TINY, **config}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3))
        return model

    return make

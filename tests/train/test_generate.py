"""Drawing with a release in the type that a recipe names."""

from __future__ import annotations

import pytest
import torch

from train.generate import Pipeline


@pytest.mark.parametrize("name", ["debug_run", "debug_sana", "debug_dit"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_bfloat16_network_has_the_velocity_of_float32_to_its_rounding(name, moved, request):
    run = request.getfixturevalue(name)
    adapter = {"adapter": run / "finetune" / "adapter.safetensors", "autoencoder": run / "tiny" / "dc-ae"}
    both = [
        Pipeline(run / "tiny" / "release", dtype=dtype, text_tokens=8, **(adapter if moved else {}))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    space = both[0].autoencoder.space
    side = 4 if moved else 16
    x = torch.randn(3, space.channels, side, side, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.02, 0.5, 0.985])
    captions = ["a red square on the left", "a blue square on the right", "a green square on the left"]
    exact, rounded = (p.velocity(x, sigma, p.text(captions), torch.tensor([1.0, 3.5, 7.0])) for p in both)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 0.05, error
    images = [p.images(["a red square on the left"], [0], 64, 64, steps=2, guidance=3.5) for p in both]
    assert (images[0] - images[1]).square().mean().sqrt() < 0.1

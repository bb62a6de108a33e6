"""Our DC-AE against diffusers' AutoencoderDC."""

from __future__ import annotations

import torch

from dcgen.dcae import DCAEConfig


def close(found: torch.Tensor, expected: torch.Tensor, relative: float) -> bool:
    scale = (expected.max() - expected.min()).item()
    return (found - expected).abs().max().item() <= relative * scale


@torch.no_grad()
def test_encode_and_decode_equal_diffusers(tiny: DCAEConfig, pair) -> None:
    oracle, model = pair(tiny)
    f = tiny.spatial_factor
    image = torch.rand(2, 3, 3 * f, 2 * f) * 2 - 1
    latent = oracle.encode(image).latent
    assert close(model.encode(image), latent, 1e-5)
    assert close(model.decode(latent), oracle.decode(latent).sample, 1e-5)


def test_gradients_equal_diffusers(tiny: DCAEConfig, pair) -> None:
    oracle, model = pair(tiny)
    f = tiny.spatial_factor
    image = torch.rand(1, 3, f, 2 * f) * 2 - 1
    oracle.eval().decode(oracle.encode(image).latent).sample.square().mean().backward()
    model(image).square().mean().backward()
    expected = {name: value.grad for name, value in oracle.named_parameters()}
    for name, value in model.named_parameters():
        assert close(value.grad, expected[name], 1e-3), name

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


def gradient_error(oracle, model, f: int) -> float:
    """Largest relative error (norm) of a parameter's gradient, on one random image."""
    image = torch.rand(1, 3, f, 2 * f) * 2 - 1
    oracle.zero_grad()
    model.zero_grad()
    oracle.decode(oracle.encode(image).latent).sample.square().mean().backward()
    model(image).square().mean().backward()
    expected = {name: value.grad for name, value in oracle.named_parameters()}
    errors = [(value.grad - expected[name]).norm() / expected[name].norm() for name, value in model.named_parameters()]
    return max(errors).item()


def test_gradients_equal_diffusers(tiny: DCAEConfig, pair) -> None:
    oracle, model = pair(tiny)
    # Measured: 1e-5 at most, but rounding moves a value across a ReLU's corner on about one image in twenty (1e-3).
    # A wrong gradient is wrong on every image.
    assert min(gradient_error(oracle, model, tiny.spatial_factor) for _ in range(3)) < 1e-4


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_diffusers(tiny: DCAEConfig, pair) -> None:
    oracle, model = pair(tiny)
    f = tiny.spatial_factor
    latent = torch.randn(2, tiny.latent_channels, 4, 2)
    image = torch.rand(1, 3, 2 * f, 2 * f) * 2 - 1
    picture, code = oracle.decode(latent).sample, oracle.encode(image).latent
    oracle, model = oracle.to(torch.bfloat16), model.to(torch.bfloat16)
    theirs = [oracle.decode(latent.bfloat16()).sample, oracle.encode(image.bfloat16()).latent]
    ours = [model.decode(latent.bfloat16(), 1), model.encode(image.bfloat16(), 1)]
    for wanted, them, us in zip((picture, code), theirs, ours, strict=True):
        assert us.dtype == torch.bfloat16
        # measured over six networks: 0.95 to 1.08 times
        assert (us.float() - wanted).norm() < 1.5 * (them.float() - wanted).norm()

"""Every published config at its real widths (random weights): our DC-AE against diffusers, both key formats."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import AutoencoderDC

from dcgen.dcae import VARIANTS, free_memory, load_dcae
from dcgen.dcae.keys import rename_table, to_original

# in and mix, sana 1.0 and 1.1, f32c128 1.1 and 1.5 are one network each under two names
NAMES = {
    "dc-ae-f32c32-sana-1.0": "dc-ae-f32c32-sana-1.1",
    "dc-ae-lite-f32c32-sana-1.1": "",
    "dc-ae-f32c32-in-1.0": "dc-ae-f32c32-mix-1.0",
    "dc-ae-f64c128-in-1.0": "dc-ae-f64c128-mix-1.0",
    "dc-ae-f128c512-in-1.0": "dc-ae-f128c512-mix-1.0",
    "dc-ae-1.5-f32c128": "dc-ae-f32c128-1.1",
    "dc-ae-1.5-f64c128": "",
}


def test_the_list_is_complete() -> None:
    assert {*NAMES, *NAMES.values()} - {""} == set(VARIANTS)
    for name, twin in NAMES.items():
        assert not twin or VARIANTS[name].architecture == VARIANTS[twin].architecture


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_real_config_equals_diffusers(name: str) -> None:
    config = dataclasses.replace(VARIANTS[name], scaling_factor=VARIANTS[name].scaling_factor or 0.5)
    with torch.device("meta"):
        oracle = AutoencoderDC.from_config(config.to_diffusers()).eval()
    count = sum(value.numel() for value in oracle.parameters())
    if free_memory(torch.device("cpu")) < 10 * count:  # the weights twice, in two layouts
        pytest.skip(f"{count * 4 >> 20} MiB of weights are too many for the free memory of this machine")
    state = {key: fill(key, value) for key, value in oracle.state_dict().items()}
    oracle.load_state_dict(state, assign=True)
    f = config.spatial_factor
    image = torch.rand(1, 3, 2 * f if f == 32 else f, f) * 2 - 1
    latent = oracle.encode(image).latent
    picture = oracle.decode(latent).sample
    del oracle
    original = to_original(state, rename_table(config, list(state)))
    model = load_dcae(original, scaling_factor=config.scaling_factor)
    del original
    assert far(model.encode(image), latent) < 1e-4
    assert far(model.decode(latent, 1), picture) < 1e-4
    assert_same(model.state_dict(), state)
    del model
    assert_same(load_dcae(state, scaling_factor=config.scaling_factor).state_dict(), state)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


NOISE = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def fill(key: str, like: torch.Tensor) -> torch.Tensor:
    """Random values of unit gain; a repeated block of noise is quicker than a billion draws."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    count = like.numel()
    start = sum(key.encode()) % 1000
    values = NOISE[start:].repeat(count // (NOISE.numel() - start) + 1)[:count].reshape(like.shape)
    if key.endswith("running_var"):
        return values.abs() + 0.5
    return values * 0.3 if like.ndim < 2 else values / like[0].numel() ** 0.5


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error as a share of the range."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / (expected.max() - expected.min())).item()

"""Latent spaces: the published numbers, the round trip of values and of metadata, the refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgen.latent import METADATA_KEY, LatentSpace
from dcgen.spaces import SPACES

# (channels, spatial factor, scaling, shift) as published; written again here so that a slip in the table is seen.
PUBLISHED = {
    "flux-f8c16": (16, 8, 0.3611, 0.1159),
    "sd-f8c4": (4, 8, 0.18215, 0.0),
    "flux2-f16c128": (128, 16, 1.0, 0.0),
    "dc-ae-f32c32-sana-1.0": (32, 32, 0.41407, 0.0),
    "dc-ae-f32c32-sana-1.1": (32, 32, 0.41407, 0.0),
    "dc-ae-lite-f32c32-sana-1.1": (32, 32, 0.41407, 0.0),
    "dc-ae-f32c32-in-1.0": (32, 32, 0.3189, 0.0),
    "dc-ae-f32c32-mix-1.0": (32, 32, 0.4552, 0.0),
    "dc-ae-f64c128-in-1.0": (128, 64, 0.2889, 0.0),
    "dc-ae-f64c128-mix-1.0": (128, 64, 0.4538, 0.0),
    "dc-ae-f128c512-in-1.0": (512, 128, 0.4883, 0.0),
    "dc-ae-f128c512-mix-1.0": (512, 128, 0.3620, 0.0),
    "dc-ae-1.5-f64c128": (128, 64, 0.5935, 0.0),
}


def test_published_numbers():
    found = {
        name: (space.channels, space.spatial_factor, space.scaling_factor, space.shift_factor)
        for name, space in SPACES.items()
    }
    assert found == PUBLISHED


@settings(deadline=None, max_examples=30)
@given(
    name=st.text(max_size=20),
    channels=st.integers(1, 6),
    factor=st.sampled_from([8, 32, 64]),
    scaling=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    preview=st.booleans(),
)
def test_round_trips(name, channels, factor, scaling, shift, preview):
    rgb = tuple((0.1 * i, -0.2, 0.3) for i in range(channels)) if preview else None
    space = LatentSpace(name, channels, factor, scaling, shift, rgb, (0.0, 0.5, 1.0) if preview else None)
    assert LatentSpace.from_metadata({**space.to_metadata(), "other": "kept out"}) == space
    raw = torch.randn(1, channels, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(space.denormalize(space.normalize(raw)), raw)


def test_normalize_is_shift_then_scale():
    raw = torch.tensor([[[[1.1159]]]], dtype=torch.float64)
    assert SPACES["flux-f8c16"].normalize(raw).item() == pytest.approx(0.3611)


def test_latent_size():
    space = SPACES["dc-ae-1.5-f64c128"]
    assert space.latent_size(4096, 3072) == (64, 48)
    with pytest.raises(ValueError, match=r"multiples of 64. Nearest: 1024x1088"):
        space.latent_size(1080, 1024)
    with pytest.raises(ValueError, match=r"multiples of 64"):
        space.latent_size(0, 64)


def test_differences_name_what_differs():
    mix, trained = SPACES["dc-ae-f32c32-mix-1.0"], SPACES["dc-ae-f32c32-in-1.0"]
    assert trained.differences(trained) == []
    assert [told.split(":")[0] for told in trained.differences(mix)] == ["scaling_factor", "autoencoder"]
    assert [told.split(":")[0] for told in trained.differences(SPACES["flux-f8c16"])] == [
        "channels",
        "spatial_factor",
        "scaling_factor",
        "shift_factor",
        "autoencoder",
    ]
    assert SPACES["dc-ae-f32c32-sana-1.0"].differences(SPACES["dc-ae-lite-f32c32-sana-1.1"]) == []
    unnamed = LatentSpace("", 32, 32, 0.3189)
    assert trained.differences(unnamed) == []
    same_numbers = LatentSpace("somebody-elses", 32, 32, 0.3189)
    assert trained.differences(same_numbers) == ["autoencoder: 'dc-ae-f32c32-in-1.0' against 'somebody-elses'"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": 0},
        {"spatial_factor": 0},
        {"scaling_factor": 0.0},
        {"scaling_factor": float("nan")},
        {"shift_factor": float("inf")},
        {"rgb_factors": ((0.0, 0.0, 0.0),)},
        {"rgb_factors": ((0.0, 0.0), (0.0, 0.0))},
        {"rgb_bias": (0.0,)},
    ],
)
def test_impossible_spaces(arguments):
    with pytest.raises(ValueError, match="latent space 'x'"):
        LatentSpace(**{"name": "x", "channels": 2, "spatial_factor": 8, "scaling_factor": 1.0, **arguments})


@pytest.mark.parametrize("entry", ["", "[]", "{}", "7", '{"name": "x"}', '{"bogus": 1}'])
def test_metadata_that_is_no_space(entry):
    with pytest.raises(ValueError, match=METADATA_KEY):
        LatentSpace.from_metadata({METADATA_KEY: entry})
    with pytest.raises(ValueError, match="unknown"):
        LatentSpace.from_metadata({})

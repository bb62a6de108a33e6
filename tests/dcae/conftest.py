"""Tiny widths of every published DC-AE, with random weights, and diffusers' AutoencoderDC as the oracle."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from diffusers import AutoencoderDC

from dcgen.dcae import DCAE, VARIANTS, DCAEConfig


def shrink(config: DCAEConfig) -> DCAEConfig:
    """Same structure (stages, block types, resampling, shortcuts), few channels and layers."""

    def widths(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(32 if value <= 256 else 64 for value in values)

    def depths(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(value, 1 + index % 2) for index, value in enumerate(values))

    return dataclasses.replace(
        config,
        encoder_block_out_channels=widths(config.encoder_block_out_channels),
        decoder_block_out_channels=widths(config.decoder_block_out_channels),
        encoder_layers_per_block=depths(config.encoder_layers_per_block),
        decoder_layers_per_block=depths(config.decoder_layers_per_block),
        latent_channels=16 if config.latent_channels == 32 else 32,
        scaling_factor=config.scaling_factor or 0.5,
    )


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights of unit gain, biases and running statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(noise.abs() + 0.5)
            else:
                value.copy_(noise * 0.3 if value.ndim < 2 else noise / value[0].numel() ** 0.5)


@pytest.fixture(params=list(VARIANTS))
def tiny(request: pytest.FixtureRequest) -> DCAEConfig:
    return shrink(VARIANTS[request.param])


@pytest.fixture
def pair():
    """(diffusers model, our model) of a config, same random weights."""

    def make(config: DCAEConfig, seed: int = 0) -> tuple[AutoencoderDC, DCAE]:
        oracle = AutoencoderDC.from_config(config.to_diffusers()).eval()
        randomise(oracle, seed)
        model = DCAE(config).eval()
        model.load_state_dict(oracle.state_dict(), strict=True)
        return oracle, model

    return make


@pytest.fixture(scope="session")
def tiny_model():
    """A function variant name -> our model of tiny widths with random weights (made once)."""

    @functools.cache
    def make(name: str) -> DCAE:
        model = DCAE(shrink(VARIANTS[name])).eval().requires_grad_(False)
        randomise(model, 1)
        return model

    return make


@pytest.fixture
def shrunk():
    """A function variant name -> its config at tiny widths."""
    return lambda name: shrink(VARIANTS[name])

"""Our DC-AE against diffusers' AutoencoderDC."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


@st.composite
def configs(draw: st.DrawFn) -> DCAEConfig:
    """Any AutoencoderDC that diffusers can build, at tiny sizes."""
    stages = draw(st.integers(2, 4))
    per_stage = {
        "types": st.sampled_from(["ResBlock", "EfficientViTBlock"]),
        "widths": st.sampled_from([8, 16, 32]),
        "scales": st.sampled_from([(), (3,), (5,), (3, 5)]),
    }
    sides = {}
    first = draw(st.integers(0, 1))  # 0 layers in the first stage: the first convolution halves the size
    for side in ("encoder", "decoder"):
        drawn = {name: tuple(draw(values) for _ in range(stages)) for name, values in per_stage.items()}
        sides[f"{side}_block_types"], sides[f"{side}_qkv_multiscales"] = drawn["types"], drawn["scales"]
        sides[f"{side}_block_out_channels"] = tuple(sorted(drawn["widths"]))
        sides[f"{side}_layers_per_block"] = (first, *(draw(st.integers(1, 2)) for _ in range(stages - 1)))
    norms = st.sampled_from(["rms_norm", "batch_norm"])
    acts = st.sampled_from(["silu", "relu", "gelu", "mish"])
    return DCAEConfig(
        name="drawn",
        latent_channels=draw(st.sampled_from([4, 8])),
        attention_head_dim=draw(st.sampled_from([4, 8])),
        downsample_block_type=draw(st.sampled_from(["pixel_unshuffle", "Conv"])),
        upsample_block_type=draw(st.sampled_from(["pixel_shuffle", "interpolate"])),
        decoder_norm_types=tuple(draw(norms) for _ in range(stages)),
        decoder_act_fns=tuple(draw(acts) for _ in range(stages)),
        encoder_out_shortcut=draw(st.booleans()),
        decoder_in_shortcut=draw(st.booleans()),
        decoder_conv_act_fn=draw(acts),
        **sides,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs(), seed=st.integers(0, 2**31), rows=st.sampled_from([None, 1, 2]))
@torch.no_grad()
def test_any_config_of_diffusers_gives_the_same_network(pair, config: DCAEConfig, seed: int, rows: int | None) -> None:
    again = dataclasses.replace(DCAEConfig.from_diffusers(config.to_diffusers()), name=config.name)
    assert again == config
    oracle, model = pair(config, seed)
    f = config.spatial_factor
    image = torch.rand(1, 3, 3 * f, 2 * f, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    latent = oracle.encode(image).latent
    assert close(model.encode(image, rows), latent, 1e-4)
    assert close(model.decode(latent, rows), oracle.decode(latent).sample, 1e-4)


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

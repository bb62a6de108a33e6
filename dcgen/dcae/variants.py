"""Every published DC-AE as data. A new autoencoder is one entry here.

Scaling factor = 1 / RMS of the raw latent: diffusers' convert_dcae_to_diffusers script and the dc-ai model zoo. None =
no published figure. `spaces.SPACES` is made from this table.
"""

from __future__ import annotations

from typing import Any

from .config import DCAEConfig

WIDTHS = (128, 256, 512, 512, 1024, 1024)


def _sana(name: str, **changes: object) -> DCAEConfig:
    types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((), (), (), (5,), (5,), (5,))
    fields: dict[str, Any] = {
        "latent_channels": 32,
        "encoder_block_types": types,
        "decoder_block_types": types,
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    }
    return DCAEConfig(name=name, **{**fields, **changes})


def _v1(name: str, latent_channels: int, extra_stages: int, scaling_factor: float) -> DCAEConfig:
    """The "in" and "mix" families: f32, and one more 2048-wide attention stage for each further halving."""
    types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (3 + extra_stages)
    widths = WIDTHS + (2048,) * extra_stages
    none = ((),) * len(widths)
    return DCAEConfig(
        name=name,
        latent_channels=latent_channels,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 4, 8, 2, 2, 2) + (2,) * extra_stages,
        decoder_layers_per_block=(0, 5, 10, 2, 2, 2) + (2,) * extra_stages,
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * (3 + extra_stages),
        decoder_act_fns=("relu",) * 3 + ("silu",) * (3 + extra_stages),
        scaling_factor=scaling_factor,
    )


def _v15(name: str, extra_stages: int, scaling_factor: float | None) -> DCAEConfig:
    """1.1 and 1.5: ResBlocks only, no outer shortcuts (arXiv:2508.00413)."""
    widths = WIDTHS + (1024,) * extra_stages
    types, layers = ("ResBlock",) * len(widths), (0, 5, 10, 4, 4, 4) + (4,) * extra_stages
    return DCAEConfig(
        name=name,
        latent_channels=128,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * len(widths),
        decoder_qkv_multiscales=((),) * len(widths),
        decoder_norm_types=("rms_norm",) * len(widths),
        decoder_act_fns=("silu",) * len(widths),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_conv_act_fn="silu",
        scaling_factor=scaling_factor,
    )


VARIANTS: dict[str, DCAEConfig] = {
    config.name: config
    for config in (
        _sana("dc-ae-f32c32-sana-1.0"),
        _sana("dc-ae-f32c32-sana-1.1"),
        _sana(
            "dc-ae-lite-f32c32-sana-1.1",
            decoder_block_types=("ResBlock",) * 6,
            decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
            decoder_qkv_multiscales=((),) * 6,
            upsample_block_type="pixel_shuffle",
            decoder_conv_act_fn="silu",
        ),
        _v1("dc-ae-f32c32-in-1.0", 32, 0, 0.3189),
        _v1("dc-ae-f32c32-mix-1.0", 32, 0, 0.4552),
        _v1("dc-ae-f64c128-in-1.0", 128, 1, 0.2889),
        _v1("dc-ae-f64c128-mix-1.0", 128, 1, 0.4538),
        _v1("dc-ae-f128c512-in-1.0", 512, 2, 0.4883),
        _v1("dc-ae-f128c512-mix-1.0", 512, 2, 0.3620),
        _v15("dc-ae-f32c128-1.1", 0, None),
        _v15("dc-ae-1.5-f32c128", 0, None),
        _v15("dc-ae-1.5-f64c128", 1, 0.5935),
    )
}

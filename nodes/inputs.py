"""Inputs that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from .sizes import CUSTOM, SIZES


def steps(tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=20, min=1, max=1000, tooltip=tooltip)


def denoise(tooltip: str) -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def shift() -> io.Float.Input:
    return io.Float.Input(
        "shift",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.01,
        optional=True,
        tooltip="0 = the checkpoint's own. Otherwise the shift r of sigma' = r sigma / (1 + (r - 1) sigma), as in "
        "ModelSamplingSD3; FLUX's mu is its logarithm, so a mu of 1.15 is a shift of 3.16.",
    )


def pixels(ignored: str, optional: bool = False) -> list[io.Int.Input]:
    """width, height and batch_size; `ignored`: the end of the tooltip, on when they are ignored."""
    side = {"default": 1024, "min": 16, "max": 16384, "step": 16, "optional": optional}
    width = "Image width in pixels: a multiple of 32 for f32 models, of 64 for f64. "
    return [
        io.Int.Input("width", tooltip=width + ignored, **side),
        io.Int.Input("height", tooltip="Image height in pixels: a multiple of the same number. " + ignored, **side),
        io.Int.Input(
            "batch_size", default=1, min=1, max=4096, optional=optional, tooltip="Number of images in the batch."
        ),
    ]


def size(tooltip: str, default: str = CUSTOM) -> io.Combo.Input:
    return io.Combo.Input("size", options=[CUSTOM, *SIZES], default=default, optional=True, tooltip=tooltip)

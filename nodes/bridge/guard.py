# B batch, C latent channels, h w latent rows and columns, f spatial factor
"""Checks around every sampling of our models, whether by core's samplers or ours.

Core nodes assume 8 image pixels per latent pixel: areas are converted here, and a size meant for f8 is logged.
Conditionings of another family are refused before sampling, NaN after it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.patcher_extension
from torch import Tensor

from .families import FAMILIES
from .latent_format import TEXT_KEY, FamilyInfo, ModelInfo

KEY = "dcgen_guard"
CORE_PIXELS = 8  # image pixels per latent pixel that core's nodes assume
LARGE = 4  # warn about images of more than this many times the pixels that a model was trained for

Conds = dict[str, list[dict[str, Any]]]


def guarded(patcher: Any) -> Any:
    """The same patcher, with these checks around its sampling."""
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patcher.remove_wrappers_with_key(kind, KEY)
    patcher.add_wrapper_with_key(kind, KEY, _sample)
    return patcher


def _sample(executor: Any, noise: Tensor, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Around CFGGuider.outer_sample. noise, latent (B,C,h,w)."""
    guider = executor.class_obj
    info: FamilyInfo = guider.model_patcher.model.dcgen
    check_frames(noise)
    check_text(guider.conds, info)
    rows, columns = noise.shape[-2:]
    set_areas(guider.conds, info, rows, columns)
    warn_large(info, rows, columns)
    samples = executor(noise, latent, *args, **kwargs)
    check_finite(samples, "sampling", _causes(noise, latent, guider.conds, args))
    return samples


def check_frames(latent: Tensor) -> None:
    """ValueError for a video latent (B,C,T,h,w) with more than one frame."""
    if latent.ndim == 5 and latent.shape[2] > 1:
        raise ValueError(
            f"the latent has {latent.shape[2]} frames, and this model makes images. Take one frame of it "
            "(LatentFromBatch or a video node), or use Empty Latent (DC-Gen)."
        )


def check_text(conds: Conds, info: FamilyInfo) -> None:
    """ValueError when a conditioning is not for the model's family."""
    family = FAMILIES[info.family]
    for cond in _all(conds):
        text = cond.get("cross_attn")
        if text is not None:
            family.check_text(text, cond, cond.get(TEXT_KEY), info.config)


def set_areas(conds: Conds, info: ModelInfo, rows: int, columns: int) -> None:
    """Convert the areas of conditionings, (height, width, y, x) in core's units of 8 pixels, to latent pixels.

    Areas in percent stay as they are. ValueError for an area outside the image.
    """
    factor = info.space.spatial_factor
    if factor == CORE_PIXELS:
        return
    for cond in _all(conds):
        area = cond.get("area")
        if area is None or area[0] == "percentage":
            continue
        pixels = [side * CORE_PIXELS for side in area]
        height, width, y, x = pixels[0], pixels[1], pixels[len(area) // 2], pixels[len(area) // 2 + 1]
        if y >= rows * factor or x >= columns * factor:
            raise ValueError(
                f"the area {width}x{height} at ({x}, {y}) lies outside the image of {columns * factor}x{rows * factor}"
            )
        top, left = min(round(y / factor), rows - 1), min(round(x / factor), columns - 1)
        cond["area"] = (
            max(1, min(round(height / factor), rows - top)),
            max(1, min(round(width / factor), columns - left)),
            top,
            left,
        )
        if any(side % factor for side in pixels):
            logging.warning(
                "DC-Gen: the area %dx%d at (%d, %d) is rounded to multiples of %d pixels, this model's latent pixel",
                *(width, height, x, y, factor),
            )


def warn_large(info: ModelInfo, rows: int, columns: int) -> None:
    """Log a warning for an image much larger than the model was trained for, as core's f8 latent nodes cause."""
    factor = info.space.spatial_factor
    pixels, trained = rows * columns * factor**2, info.native_tokens * (factor * info.patch_size) ** 2
    if factor > CORE_PIXELS and pixels > LARGE * trained:
        side = round(trained**0.5)
        logging.warning(
            "DC-Gen: this makes an image of %dx%d; the model was made for about %dx%d. Core's EmptyLatentImage, "
            "EmptySD3LatentImage and LatentUpscale assume 8 pixels per latent pixel, this model has %d: for the size "
            "you type, use Empty Latent (DC-Gen).",
            *(columns * factor, rows * factor, side, side, factor),
        )


def check_finite(result: Tensor, stage: str, causes: Iterable[str] = ()) -> None:
    """ValueError when a result has NaN or infinity, which would be a black image. Costs one reduction.

    causes: explanations, the most certain first; evaluated only on failure.
    """
    if result.sum().isfinite():
        return
    cause = next(iter(causes), None) or (
        "values overflowed in the model: try another weight_dtype, or start ComfyUI with --force-fp32 or a bf16 "
        "option, and check LoRA strengths"
    )
    raise ValueError(f"{stage} gave NaN or infinite values, which would be a black image: {cause}.")


def _causes(noise: Tensor, latent: Tensor, conds: Conds, args: tuple) -> Iterator[str]:
    """Inputs of the sampling that already had NaN."""
    inputs: dict[str, Any] = {"the latent given to the sampler": latent, "the noise": noise}
    inputs |= {f"the {name} conditioning": c.get("cross_attn") for name, group in conds.items() for c in group}
    inputs |= {"the sampler's sigmas or mask": next((a for a in args[1:3] if isinstance(a, Tensor)), None)}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not value.float().sum().isfinite():
            yield f"{name} already had them. Check the node that made it"


def _all(conds: Conds) -> Iterator[dict[str, Any]]:
    for group in conds.values():
        yield from group

# B batch, C latent channels, h w latent rows and columns, N steps
"""Sampling with ComfyUI's own samplers and the checkpoint's own schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
import torch
from torch import Tensor

from .latent_format import ModelInfo, check_tag, space_of_vae
from .model_info import info_of
from .samplers import sampler_object


def check_latent(model: Any, latent: dict[str, Any]) -> ModelInfo:
    """ValueError, before any compute, when a LATENT does not fit the model."""
    info = info_of(model)
    samples = latent["samples"]
    expected = f"{info.space.channels} channels at f{info.space.spatial_factor}"
    name = info.space.name or "the model's autoencoder"
    if samples.ndim != 4 or samples.shape[1] != info.space.channels:
        raise ValueError(
            f"the latent has shape {tuple(samples.shape)}, but this model samples {expected} ({name}). Make it with "
            "Empty Latent (DC-Gen), or encode the image with that autoencoder (DC-AE Encode)."
        )
    if samples.shape[2] % info.patch_size or samples.shape[3] % info.patch_size:
        raise ValueError(
            f"the latent has {samples.shape[2]}x{samples.shape[3]} rows and columns, which the model's patches of "
            f"{info.patch_size} do not divide. Use an image size in multiples of "
            f"{info.space.spatial_factor * info.patch_size}."
        )
    check_tag(latent, info.space, "this model")
    return info


def start(
    model: Any, latent: dict[str, Any], image: Tensor | None, vae: Any, steps: int, denoise: float, shift: float
) -> tuple[dict[str, Any], Tensor]:
    """(the LATENT that sampling starts from, with `image` encoded into it if given; sigmas (N+1,)).

    ValueError for inputs that do not fit the model.
    """
    latent = latent if image is None else encoded(model, latent, image, vae)
    return latent, sigmas_for(model, latent, steps, denoise, shift)


def encoded(model: Any, latent: dict[str, Any], image: Tensor, vae: Any) -> dict[str, Any]:
    """`latent` with an image (B,H,W,3), scaled to its size and encoded. ValueError for a VAE of another model."""
    info = check_latent(model, latent)
    if vae is None:
        raise ValueError("an image was connected but no vae; connect the autoencoder that belongs to the model.")
    differences = _vae_differences(vae, info)
    if differences:
        raise ValueError(f"this vae does not belong to the model. Different: {'; '.join(differences)}.")
    height, width = (side * info.space.spatial_factor for side in latent["samples"].shape[2:])
    pixels = image.movedim(-1, 1)
    if pixels.shape[2:] != (height, width):
        # Not lanczos, which core computes in 8 bits.
        method = "bicubic" if height > pixels.shape[2] else "area"
        pixels = comfy.utils.common_upscale(pixels, width, height, method, "center").clamp(0, 1)
    samples = vae.encode(pixels.movedim(1, -1)[..., :3])
    return {**latent, "samples": comfy.utils.repeat_to_batch_size(samples, latent["samples"].shape[0])}


def _vae_differences(vae: Any, info: ModelInfo) -> list[str]:
    space = space_of_vae(vae)
    if not hasattr(vae, "space"):  # core's VAEs leave the scaling to the model
        fields = ("scaling_factor", "shift_factor", "mean", "std", "temporal_factor", "packing")
        space = replace(space, **{field: getattr(info.space, field) for field in fields})
    return space.differences(info.space)


def sigmas_for(model: Any, latent: dict[str, Any], steps: int, denoise: float, shift: float = 0.0) -> Tensor:
    """Sigmas (N+1,) float32 for this model at this latent's size; denoise < 1 keeps the last part of a longer schedule.

    shift: r of dcgen.schedule instead of the checkpoint's; 0 = the checkpoint's. ValueError for a model that is not a
    flow model.
    """
    info = check_latent(model, latent)
    if denoise <= 0:
        return torch.zeros(0)
    rows, columns = latent["samples"].shape[2:]
    tokens = (rows // info.patch_size) * (columns // info.patch_size)
    total = steps if denoise >= 1 else int(steps / denoise)
    if info.schedule is None:
        raise ValueError("this model is not a flow model and has no shift. Use core's BasicScheduler and KSampler.")
    schedule = info.schedule.shifted_by(shift) if shift else info.schedule
    return schedule.sigmas(total, tokens=tokens, channels=info.token_channels)[-(steps + 1) :]


def sample(
    model: Any,
    latent: dict[str, Any],
    sigmas: Tensor,
    seed: int,
    sampler_name: str,
    positive: list,
    negative: list | None = None,
    cfg: float = 1.0,
    guidance: float | None = None,
) -> dict[str, Any]:
    """LATENT sampled from `latent` along `sigmas`, as core's SamplerCustomAdvanced does.

    Without `negative` the model runs once per step; with it and cfg != 1, twice. guidance: a distilled model's scale
    g = 1 + w instead of the conditioning's.
    """
    check_latent(model, latent)
    if guidance is not None:
        positive = with_guidance(positive, guidance)
        negative = with_guidance(negative, guidance) if negative else negative
    sampler = sampler_object(sampler_name, model)
    image = latent["samples"]
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    if negative is None:
        guider.inner_set_conds({"positive": positive})
    else:
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
    samples = guider.sample(
        noise,
        image,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, sigmas.shape[-1] - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    rest = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"}
    return {**rest, "samples": samples.to(comfy.model_management.intermediate_device())}


def with_guidance(conditioning: list, guidance: float) -> list:
    """CONDITIONING with a distilled model's guidance scale g = 1 + w."""
    return node_helpers.conditioning_set_values(conditioning, {"guidance": guidance})

"""Guesses from its key names what an unexpected file of weights is, for error messages; loaders by ComfyUI's names."""

from __future__ import annotations

from collections.abc import Collection

# Key suffixes of scales and formats in quantised files of ComfyUI, its converters and bitsandbytes.
QUANTISED = (
    ".scale_weight",
    ".weight_scale",
    ".scale_input",
    ".comfy_quant",
    "scaled_fp8",
    ".weight.absmax",
    ".quant_map",
    ".qweight",
)
# Prefix of the network in one file with network, text encoders and autoencoder.
ALL_IN_ONE = "model.diffusion_model."


# Beginnings of the keys that only a ControlNet has: diffusers' and others', and SANA's original ones.
CONTROLNET = ("controlnet_", "controlnet.")


def is_controlnet(keys: Collection[str]) -> bool:
    """Whether these are a ControlNet's weights: blocks of its base, and layers of its own."""
    return any(key.startswith(CONTROLNET) for key in keys)


def is_quantised(keys: Collection[str]) -> bool:
    """Whether the weights have scales (scaled fp8 and similar formats)."""
    return any(key.endswith(QUANTISED) for key in keys)


def what_it_may_be(keys: Collection[str], otherwise: str) -> str:
    """A sentence on what a file with these keys looks like and how to load it; `otherwise` if that is unknown."""
    if is_controlnet(keys):
        return (
            "It looks like a ControlNet, not a model: it takes latents of the autoencoder that it was trained with, "
            "and no node here loads it. For a base on its own latent use core's Load ControlNet Model."
        )
    if is_quantised(keys):
        return (
            "It looks like a quantised model (scaled fp8 or the like): load it with a model loader that knows it, or "
            "take the unquantised file."
        )
    if any("lora_" in key for key in keys):
        return "It looks like an ordinary LoRA: load it with Load LoRA."
    if any(key.startswith(ALL_IN_ONE) for key in keys) and not all(key.startswith(ALL_IN_ONE) for key in keys):
        return "It looks like an all-in-one checkpoint: load it with Load Checkpoint."
    if any(".blocks." in key or "_blocks." in key for key in keys):
        return "It looks like a whole model: load it with Load Diffusion Model."
    if any(key.startswith(("encoder.", "decoder.", "first_stage_model.", "vae.")) for key in keys):
        return "It looks like an autoencoder: load it with Load VAE."
    if any(key.startswith(("text_model.", "text_encoders.", "shared.", "model.embed_tokens.")) for key in keys):
        return "It looks like a text encoder: load it with Load CLIP."
    return otherwise

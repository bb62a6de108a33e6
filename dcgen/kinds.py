"""What a file of weights may be that is not what was asked for, judged by the names in it."""

from __future__ import annotations

from collections.abc import Collection

# Scales and notes beside the weights of a quantised file, as ComfyUI, its converters and bitsandbytes name them.
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
# Where one file with network, text encoders and autoencoder has its network.
ALL_IN_ONE = "model.diffusion_model."


def is_quantised(keys: Collection[str]) -> bool:
    """Whether weights come with scales of their own (scaled fp8 and the like)."""
    return any(key.endswith(QUANTISED) for key in keys)


def what_it_may_be(keys: Collection[str], otherwise: str) -> str:
    """A sentence on what a file with these names looks like, and what to do with it; `otherwise` if like nothing."""
    if is_quantised(keys):
        return (
            "It looks like a quantised model (scaled fp8 or the like): load it with a model loader that knows it, or "
            "take the unquantised file."
        )
    if any("lora_" in key for key in keys):
        return "It looks like an ordinary LoRA: load it with a LoRA loader."
    if any(key.startswith(ALL_IN_ONE) for key in keys) and not all(key.startswith(ALL_IN_ONE) for key in keys):
        return "It looks like an all-in-one checkpoint: load it with the checkpoint loader."
    if any(".blocks." in key or "_blocks." in key for key in keys):
        return "It looks like a whole model: load it with the model loader."
    if any(key.startswith(("encoder.", "decoder.", "first_stage_model.", "vae.")) for key in keys):
        return "It looks like an autoencoder: load it with the autoencoder loader."
    if any(key.startswith(("text_model.", "text_encoders.", "shared.", "model.embed_tokens.")) for key in keys):
        return "It looks like a text encoder: load it with the text encoder loader."
    return otherwise

# B batch, C latent channels, f spatial factor
"""A DC-AE as ComfyUI's VAE object, so that every core VAE node works with it."""

from __future__ import annotations

import os
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch

from ...dcgen.dcae import DCAE, load_dcae


class DCAEVAE(comfy.sd.VAE):
    """comfy.sd.VAE around a DC-AE. Latents are raw; the model's latent format scales them."""

    def __init__(self, dcae: DCAE) -> None:
        # The one-key state dict makes this core's own constructor set every attribute it knows of.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        config = dcae.config
        self.dcae = dcae
        self.downscale_ratio = self.upscale_ratio = config.spatial_factor
        self.latent_channels = config.latent_channels
        self.first_stage_model = dcae.eval()
        self.vae_dtype = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        offload = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.ModelPatcher(dcae, load_device=self.device, offload_device=offload)
        self.size = None


def make_vae(source: DCAE | str | os.PathLike[str], **options: Any) -> DCAEVAE:
    """VAE from a DC-AE file, a folder (config.json beside the weights), or a loaded DCAE built on comfy.ops layers.

    options go to load_dcae (scaling_factor). Raises DCAEError, which names the file, for anything that is not a DC-AE.
    """
    if not isinstance(source, DCAE):
        source = load_dcae(source, operations=comfy.ops.disable_weight_init, **options)
    return DCAEVAE(source)

# B batch, C latent channels, h w latent rows and columns, H W image rows and columns, f spatial factor
"""A DC-AE as ComfyUI's VAE object, so that every core VAE node works with it, always exactly.

Core decodes whole pictures and falls back to tiles when memory runs out. Here both are the same exact computation in
strips: the strip follows the free memory, a tile size is an upper bound for it, and after an out-of-memory it halves.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...dcgen.dcae import DCAE, Strip, choose_strip, load_dcae, peak_bytes
from ...dcgen.dcae.model import check_latent
from ...dcgen.latent import LatentSpace
from .guard import check_finite, check_frames
from .loading import is_dynamic
from .strip_preview import StripPreview

# Larger strips are hardly faster, so no more than this is asked for (a working set, bytes).
WORKING_BYTES = 512 << 20
CPU_WORKING_BYTES = 256 << 20


class DCAEVAE(comfy.sd.VAE):
    """comfy.sd.VAE around a DC-AE. Latents are raw (B,C,h,w); the model's latent format scales them."""

    def __init__(self, dcae: DCAE, disable_dynamic: bool = False) -> None:
        # The one-key state dict makes this core's own constructor set every attribute it knows of.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        config = dcae.config
        self.downscale_ratio = self.upscale_ratio = config.spatial_factor
        self.latent_channels = config.latent_channels
        self.first_stage_model = dcae.eval()
        self.vae_dtype = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        if hasattr(comfy.model_management, "archive_model_dtypes"):  # what a dynamic patcher casts to
            comfy.model_management.archive_model_dtypes(dcae)
        # Every layer either is the core's own or casts its weights itself, so the dynamic patcher will do.
        plain = comfy.model_patcher.ModelPatcher
        kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
        self.patcher = kind(dcae, load_device=self.device, offload_device=comfy.model_management.vae_offload_device())
        if not is_dynamic(self.patcher):  # which copies weights out in their plain order
            dcae.to(memory_format=torch.channels_last)
        self.size = None
        self.memory_used_decode = lambda shape, dtype: self._memory("decode", shape[-2], shape[-1], dtype)
        self.memory_used_encode = lambda shape, dtype: self._memory(
            "encode", shape[-2] // config.spatial_factor, shape[-1] // config.spatial_factor, dtype
        )

    @property
    def dcae(self) -> DCAE:
        """The autoencoder; the core may give this object another copy of it (Select VAE Device)."""
        return self.first_stage_model

    def get_sd(self) -> dict[str, Tensor]:
        """What core's VAE Save writes; safetensors takes contiguous tensors only."""
        return {key: value.contiguous() for key, value in super().get_sd().items()}

    @property
    def space(self) -> LatentSpace:
        """Name, scale and preview factors of its latents."""
        return self.dcae.latent_space

    def decode(self, samples_in: Tensor, *args: Any, **options: Any) -> Tensor:
        """Latent (B,C,h,w) -> IMAGE (B,H,W,3) in 0..1."""
        return self.decode_strips(samples_in)

    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, *args, **options):
        """As decode: tiles are not needed. A tile's height (latent rows) bounds the strip."""
        return self.decode_strips(samples, most=tile_y)

    def encode(self, pixel_samples: Tensor, *args: Any, **options: Any) -> Tensor:
        """IMAGE (B,H,W,3) in 0..1 -> latent (B,C,h,w); sides that f does not divide are cropped as core does."""
        return self.encode_strips(pixel_samples)

    def encode_tiled(
        self, pixel_samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, *args, **options
    ):
        """As encode; a tile's height (pixels) bounds the strip."""
        return self.encode_strips(pixel_samples, most=tile_y and max(1, tile_y // self.downscale_ratio))

    def decode_tiled_(self, samples: Tensor, *args: Any, **options: Any) -> Tensor:
        """(B,3,H,W) in 0..1; what core calls after an out-of-memory."""
        return self.decode_strips(samples).movedim(-1, 1)

    def encode_tiled_(self, pixel_samples: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.encode_strips(pixel_samples.movedim(1, -1))

    def decode_strips(self, samples: Tensor, strip: int = 0, most: int | None = None, preview: bool = False) -> Tensor:
        """Latent -> IMAGE with `strip` latent rows at a time (0 = as memory allows, at most `most`)."""
        check_frames(samples)
        if samples.ndim == 5:
            samples = samples[:, :, 0]
        check_latent(samples, self.dcae.config)
        f = self.dcae.config.spatial_factor
        shape = (samples.shape[-2] * f, samples.shape[-1] * f)
        out = torch.empty((samples.shape[0], *shape, 3), dtype=torch.float32, device=self.output_device)
        show = StripPreview(*shape) if preview else None

        def work(one: Tensor, chosen: Strip, progress: Callable) -> Tensor:
            return self.dcae.decode(one, chosen.rows, columns=chosen.columns, progress=progress)

        for index, picture in enumerate(self._each("decode", samples, samples.shape[-2:], strip, most, work, show)):
            out[index] = self.process_output(picture[0].to(self.output_device).float()).movedim(0, -1)
        check_finite(out, "DC-AE decoding", _had_nan("the latent", samples))
        return out

    def encode_strips(self, pixels: Tensor, strip: int = 0, most: int | None = None) -> Tensor:
        """IMAGE -> latent with `strip` latent rows at a time (0 = as memory allows, at most `most`)."""
        pixels = self.vae_encode_crop_pixels(pixels).movedim(-1, 1)
        f = self.dcae.config.spatial_factor
        if 0 in pixels.shape:
            raise ValueError(
                f"the image is smaller than {f}x{f}, one latent pixel of {self.dcae.config.name}; enlarge it"
            )

        def work(one: Tensor, chosen: Strip, progress: Callable) -> Tensor:
            image = self.process_input(one)
            return self.dcae.encode(image, chosen.rows, columns=chosen.columns, progress=progress)

        size = (pixels.shape[-2] // f, pixels.shape[-1] // f)
        each = self._each("encode", pixels, size, strip, most, work, None)
        latents = torch.cat([latent.to(self.output_device).float() for latent in each])
        check_finite(latents, "DC-AE encoding", _had_nan("the image", pixels))
        return latents

    def _each(self, direction, batch, size, strip, most, work, show):
        """Results of `work` for each picture of the batch, with loading, progress, cancel and smaller strips."""
        h, w = size
        memory = self._memory(direction, h, w, self.vae_dtype)
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=memory, force_full_load=self.disable_offload
        )
        bar = comfy.utils.ProgressBar(batch.shape[0] * 1000)
        chosen = None
        for index, one in enumerate(batch.split(1)):

            def progress(done: int, total: int, rows: Tensor | None, index: int = index) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                image = show.add(rows) if show is not None and rows is not None else None
                bar.update_absolute(index * total + done, batch.shape[0] * total, image)

            if chosen is None:
                chosen = self._strip(direction, h, w, strip, most)
            while True:
                failed = False
                if show is not None:
                    show.restart()
                try:
                    result = work(one.to(self.device, self.vae_dtype), chosen, progress)
                except Exception as error:
                    if not out_of_memory(error) or chosen == smaller(chosen, h, w):
                        raise
                    failed = True  # the exception holds the tensors of its frames: retry after it is gone
                if not failed:
                    break
                chosen = smaller(chosen, h, w)
                logging.warning(
                    "DC-AE %s: out of memory, again in strips of %s (rows, columns)", direction, tuple(chosen)
                )
                comfy.model_management.soft_empty_cache()
            yield result

    def _strip(self, direction: str, h: int, w: int, strip: int, most: int | None) -> Strip:
        if strip > 0:
            return Strip(min(strip, h))
        # A patcher's own figure counts what models under dynamic VRAM give up at once; older cores have none.
        own = getattr(self.patcher, "get_free_memory", comfy.model_management.get_free_memory)
        free = own(self.device)
        working = CPU_WORKING_BYTES if comfy.model_management.is_device_cpu(self.device) else WORKING_BYTES
        chosen = choose_strip(self.dcae.config, h, w, self.vae_dtype, free, direction, working)
        if most is not None and (chosen.rows is None or chosen.rows > most):
            return Strip(max(1, most), chosen.columns)
        return chosen

    def _memory(self, direction: str, h: int, w: int, dtype: torch.dtype) -> int:
        """Bytes that a comfortable strip needs: what is worth offloading other models for."""
        config = self.dcae.config
        strip = choose_strip(config, max(1, h), max(1, w), dtype, 1 << 50, direction, WORKING_BYTES)
        return peak_bytes(config, max(1, h), max(1, w), dtype, strip, direction)


def _had_nan(name: str, given: Tensor) -> Iterator[str]:
    if not given.float().sum().isfinite():
        yield f"{name} already had them. Look at the node that made it"


def out_of_memory(error: Exception) -> bool:
    """Whether the core takes an error for too little memory."""
    management = comfy.model_management
    if isinstance(error, management.InterruptProcessingException):
        return False  # an Exception in older cores, where OOM_EXCEPTION may be all of them
    asked = getattr(management, "is_oom", None)
    return asked(error) if asked else isinstance(error, management.OOM_EXCEPTION)


def smaller(strip: Strip, h: int, w: int) -> Strip:
    """Half the rows; from one row on, half the columns; the same when nothing smaller is left."""
    rows = h if strip.rows is None else strip.rows
    if rows > 1 or strip.rows is None:
        return Strip(max(1, rows // 2), strip.columns)
    columns = w if strip.columns is None else strip.columns
    return Strip(1, max(1, columns // 2)) if columns > 1 else strip


@torch.inference_mode(False)
def make_vae(
    source: DCAE | str | os.PathLike[str], scaling_factor: float | None = None, disable_dynamic: bool = False
) -> DCAEVAE:
    """VAE from a DC-AE file, a folder (config.json beside the weights), or a loaded DCAE built on comfy.ops layers.

    Raises DCAEError, which names the file, for anything that is not a DC-AE.
    """
    if isinstance(source, DCAE):
        return DCAEVAE(source, disable_dynamic)
    dcae = load_dcae(source, operations=comfy.ops.disable_weight_init, scaling_factor=scaling_factor)
    vae = DCAEVAE(dcae, disable_dynamic)
    vae.patcher.cached_patcher_init = (_patcher, (source, scaling_factor))
    return vae


def _patcher(source: Any, scaling_factor: float | None, disable_dynamic: bool = False) -> Any:
    return make_vae(source, scaling_factor, disable_dynamic).patcher


def as_dcae(vae: Any, node: str) -> DCAEVAE:
    """The VAE if it is a DC-AE, else a ValueError that says which node takes it."""
    if not isinstance(vae, DCAEVAE):
        raise ValueError(f"this VAE is not a DC-AE: load one with DCAELoader, or use {node} for this one")
    return vae

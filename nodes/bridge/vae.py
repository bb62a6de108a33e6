# B batch, C latent channels, h w latent rows and columns, H W image rows and columns, f spatial factor
"""A DC-AE as ComfyUI's VAE object: every core VAE node works with it, and the result is always exact.

Core decodes whole images and falls back to tiles when memory runs out. Here both are the same exact computation in
strips: the strip size depends on the free memory, a tile size is its upper bound, and it is halved after an
out-of-memory error.
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

from ...dcgen.dcae import DCAE, DCAESource, Strip, choose_strip, load_dcae, peak_bytes
from ...dcgen.dcae.model import check_latent
from ...dcgen.latent import LatentSpace
from .guard import check_finite, check_frames
from .loading import is_dynamic
from .strip_preview import StripPreview

# Upper limit of a strip's working set in bytes; larger strips are hardly faster.
WORKING_BYTES = 512 << 20
CPU_WORKING_BYTES = 256 << 20


class DCAEVAE(comfy.sd.VAE):
    """comfy.sd.VAE around a DC-AE. Latents are raw (B,C,h,w); the model's latent format scales them."""

    def __init__(self, dcae: DCAE, disable_dynamic: bool = False) -> None:
        # With this one-key state dict core's own constructor sets all attributes that this version has.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        config = dcae.config
        self.downscale_ratio = self.upscale_ratio = config.spatial_factor
        self.latent_channels = config.latent_channels
        self.first_stage_model = dcae.eval()
        self.vae_dtype = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        if hasattr(comfy.model_management, "archive_model_dtypes"):  # the dtypes that a dynamic patcher casts to
            comfy.model_management.archive_model_dtypes(dcae)
        # Every layer is core's own or casts its weights itself, so the dynamic patcher works.
        plain = comfy.model_patcher.ModelPatcher
        kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
        self.patcher = kind(dcae, load_device=self.device, offload_device=comfy.model_management.vae_offload_device())
        if not is_dynamic(self.patcher):  # a dynamic patcher copies weights in contiguous order
            dcae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.size = None
        self.memory_used_decode = lambda shape, dtype: self._memory("decode", shape[-2], shape[-1], dtype)
        self.memory_used_encode = lambda shape, dtype: self._memory(
            "encode", shape[-2] // config.spatial_factor, shape[-1] // config.spatial_factor, dtype
        )

    @property
    def dcae(self) -> DCAE:
        """The autoencoder; core may replace it by a copy (Select VAE Device)."""
        return self.first_stage_model

    def get_sd(self) -> dict[str, Tensor]:
        """State dict for core's VAE Save; safetensors accepts contiguous tensors only."""
        return {key: value.contiguous() for key, value in super().get_sd().items()}

    @property
    def space(self) -> LatentSpace:
        """Name, scale and preview factors of its latents."""
        return self.dcae.latent_space

    def decode(self, samples_in: Tensor, *args: Any, **options: Any) -> Tensor:
        """Latent (B,C,h,w) -> IMAGE (B,H,W,3) in 0..1."""
        return self.decode_strips(samples_in)

    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, *args, **options):
        """As decode: tiles are not needed. A tile's height (latent rows) is the maximum strip."""
        return self.decode_strips(samples, max_rows=tile_y)

    def encode(self, pixel_samples: Tensor, *args: Any, **options: Any) -> Tensor:
        """IMAGE (B,H,W,3) in 0..1 -> latent (B,C,h,w); sides that f does not divide are cropped as core does."""
        return self.encode_strips(pixel_samples)

    def encode_tiled(
        self, pixel_samples: Tensor, tile_x: int | None = None, tile_y: int | None = None, *args, **options
    ):
        """As encode; a tile's height (pixels) is the maximum strip."""
        return self.encode_strips(pixel_samples, max_rows=tile_y and max(1, tile_y // self.downscale_ratio))

    def decode_tiled_(self, samples: Tensor, *args: Any, **options: Any) -> Tensor:
        """(B,3,H,W) in 0..1; core calls it after an out-of-memory error."""
        return self.decode_strips(samples).movedim(-1, 1)

    def encode_tiled_(self, pixel_samples: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.encode_strips(pixel_samples.movedim(1, -1))

    def decode_strips(
        self, samples: Tensor, strip: int = 0, max_rows: int | None = None, preview: bool = False
    ) -> Tensor:
        """Latent -> IMAGE with `strip` latent rows at a time (0 = as memory allows, at most `max_rows`)."""
        check_frames(samples)
        if samples.ndim == 5:
            samples = samples[:, :, 0]
        check_latent(samples, self.dcae.config)
        f = self.dcae.config.spatial_factor
        shape = (samples.shape[-2] * f, samples.shape[-1] * f)
        out = torch.empty((samples.shape[0], *shape, 3), dtype=torch.float32, device=self.output_device)
        canvas = StripPreview(*shape) if preview else None

        def decode(latent: Tensor, strip: Strip, progress: Callable) -> Tensor:
            return self.dcae.decode(latent, strip.rows, columns=strip.columns, progress=progress)

        images = self._each("decode", samples, samples.shape[-2:], strip, max_rows, decode, canvas)
        for index, image in enumerate(images):
            out[index] = self.process_output(image[0].to(self.output_device).float()).movedim(0, -1)
        check_finite(out, "DC-AE decoding", _had_nan("the latent", samples))
        return out

    def encode_strips(self, pixels: Tensor, strip: int = 0, max_rows: int | None = None) -> Tensor:
        """IMAGE -> latent with `strip` latent rows at a time (0 = as memory allows, at most `max_rows`)."""
        pixels = self.vae_encode_crop_pixels(pixels).movedim(-1, 1)
        f = self.dcae.config.spatial_factor
        if 0 in pixels.shape:
            raise ValueError(
                f"the image is smaller than {f}x{f}, one latent pixel of {self.dcae.config.name}; enlarge it"
            )

        def encode(image: Tensor, strip: Strip, progress: Callable) -> Tensor:
            image = self.process_input(image)
            return self.dcae.encode(image, strip.rows, columns=strip.columns, progress=progress)

        size = (pixels.shape[-2] // f, pixels.shape[-1] // f)
        results = self._each("encode", pixels, size, strip, max_rows, encode, None)
        latents = torch.cat([latent.to(self.output_device).float() for latent in results])
        check_finite(latents, "DC-AE encoding", _had_nan("the image", pixels))
        return latents

    def _each(self, direction, batch, size, strip, max_rows, run, canvas):
        """Results of `run` for each image of the batch, with model loading, progress, interrupt and smaller strips."""
        h, w = size
        memory = self._memory(direction, h, w, self.vae_dtype)
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=memory, force_full_load=self.disable_offload
        )
        bar = comfy.utils.ProgressBar(batch.shape[0] * 1000)
        chosen = None
        for index, item in enumerate(batch.split(1)):

            def progress(done: int, total: int, rows: Tensor | None, index: int = index) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                preview = canvas.add(rows) if canvas is not None and rows is not None else None
                bar.update_absolute(index * total + done, batch.shape[0] * total, preview)

            if chosen is None:
                chosen = self._strip(direction, h, w, strip, max_rows)
            while True:
                failed = False
                if canvas is not None:
                    canvas.restart()
                try:
                    result = run(item.to(self.device, self.vae_dtype), chosen, progress)
                except Exception as error:
                    if not out_of_memory(error) or chosen == smaller(chosen, h, w):
                        raise
                    failed = True  # the exception keeps tensors alive: retry outside of this block
                if not failed:
                    break
                chosen = smaller(chosen, h, w)
                logging.warning(
                    "DC-AE %s: out of memory, trying again in strips of %s (rows, columns)", direction, tuple(chosen)
                )
                comfy.model_management.soft_empty_cache()
            yield result

    def _strip(self, direction: str, h: int, w: int, strip: int, max_rows: int | None) -> Strip:
        if strip > 0:
            return Strip(min(strip, h))
        # The patcher's own figure includes memory that dynamic VRAM frees on demand; older versions lack the method.
        get_free_memory = getattr(self.patcher, "get_free_memory", comfy.model_management.get_free_memory)
        free = get_free_memory(self.device)
        working = CPU_WORKING_BYTES if comfy.model_management.is_device_cpu(self.device) else WORKING_BYTES
        chosen = choose_strip(self.dcae.config, h, w, self.vae_dtype, free, direction, working)
        if max_rows is not None and (chosen.rows is None or chosen.rows > max_rows):
            return Strip(max(1, max_rows), chosen.columns)
        return chosen

    def _memory(self, direction: str, h: int, w: int, dtype: torch.dtype) -> int:
        """Bytes for a strip of the preferred size, for which core offloads other models."""
        config = self.dcae.config
        strip = choose_strip(config, max(1, h), max(1, w), dtype, 1 << 50, direction, WORKING_BYTES)
        return peak_bytes(config, max(1, h), max(1, w), dtype, strip, direction)


def _had_nan(name: str, tensor: Tensor) -> Iterator[str]:
    if not tensor.float().sum().isfinite():
        yield f"{name} already had them. Check the node that made it"


def out_of_memory(error: Exception) -> bool:
    """Whether core treats an error as out of memory."""
    management = comfy.model_management
    if isinstance(error, management.InterruptProcessingException):
        return False  # older versions: an Exception, and OOM_EXCEPTION may be Exception itself
    is_oom = getattr(management, "is_oom", None)
    return is_oom(error) if is_oom else isinstance(error, management.OOM_EXCEPTION)


def smaller(strip: Strip, h: int, w: int) -> Strip:
    """Half the rows; at one row, half the columns; the same strip when it cannot be smaller."""
    rows = h if strip.rows is None else strip.rows
    if rows > 1 or strip.rows is None:
        return Strip(max(1, rows // 2), strip.columns)
    columns = w if strip.columns is None else strip.columns
    return Strip(1, max(1, columns // 2)) if columns > 1 else strip


@torch.inference_mode(False)
def make_vae(
    source: DCAE | DCAESource | str | os.PathLike[str],
    scaling_factor: float | None = None,
    disable_dynamic: bool = False,
) -> DCAEVAE:
    """VAE from a DC-AE file or folder, by path or opened, or from a loaded DCAE built on comfy.ops layers.

    Raises DCAEError, which names the file, for anything that is not a DC-AE.
    """
    if isinstance(source, DCAE):
        return DCAEVAE(source, disable_dynamic)
    dcae = load_dcae(source, operations=comfy.ops.disable_weight_init, scaling_factor=scaling_factor)
    vae = DCAEVAE(dcae, disable_dynamic)
    path = source.path if isinstance(source, DCAESource) else source
    vae.patcher.cached_patcher_init = (_patcher, (path, scaling_factor))
    return vae


def _patcher(source: Any, scaling_factor: float | None, disable_dynamic: bool = False) -> Any:
    return make_vae(source, scaling_factor, disable_dynamic).patcher


def as_dcae(vae: Any, node: str) -> DCAEVAE:
    """The VAE if it is a DC-AE; else a ValueError that names the node for other VAEs."""
    if not isinstance(vae, DCAEVAE):
        raise ValueError(f"this VAE is not a DC-AE: load one with DCAELoader, or use {node} for this one")
    return vae

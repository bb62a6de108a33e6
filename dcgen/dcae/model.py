"""The DC-AE network (arXiv:2410.10733), computed as a stream of image rows.

The layers are in layers.py and attention.py; plan.py decides how much each works on at a time and run.py does it. One
chunk is the usual whole-image forward pass (and what training uses).
"""

# B batch, C channels, H W rows and columns at the layer's own resolution, f spatial factor

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..latent import LatentSpace
from .attention import EfficientViTBlock
from .config import DCAEConfig, DCAEError
from .layers import Conv, Device, Down, Head, Layer, ResBlock, RMSNorm, Up, conv3x3
from .plan import CPU_WORKING_BYTES, Chain, budget, free_memory, whole_budget
from .run import Meter, Progress, run, run_panels
from .stream import batched


def make_block(
    config: DCAEConfig, side: str, stage: int, operations: Any, dtype: torch.dtype | None, device: Device
) -> nn.Module:
    channels = getattr(config, f"{side}_block_out_channels")[stage]
    norm = config.decoder_norm_types[stage] if side == "decoder" else "rms_norm"
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        act = config.decoder_act_fns[stage] if side == "decoder" else "silu"
        return ResBlock(channels, norm, act, operations, dtype, device)
    scales = getattr(config, f"{side}_qkv_multiscales")[stage]
    return EfficientViTBlock(channels, config.attention_head_dim, scales, norm, operations, dtype, device)


class Encoder(nn.Module):
    """Image (B,3,H,W) -> raw latent (B,C,H/f,W/f). Attribute names are diffusers' key names."""

    def __init__(self, config: DCAEConfig, operations: Any, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.shortcut = config.encoder_out_shortcut
        if layers[0]:
            self.conv_in = conv3x3(operations, config.in_channels, widths[0], **factory_kwargs)
        else:
            self.conv_in = Down(config.in_channels, widths[1], unshuffle, False, operations, **factory_kwargs)
        self.down_blocks = nn.ModuleList()
        for stage, count in enumerate(layers):
            blocks = [make_block(config, "encoder", stage, operations, dtype, device) for _ in range(count)]
            if count and stage < len(widths) - 1:
                blocks.append(Down(widths[stage], widths[stage + 1], unshuffle, True, operations, **factory_kwargs))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = conv3x3(operations, widths[-1], config.latent_channels, **factory_kwargs)

    def layers(self) -> list[Layer]:
        inner = [layer for stage in self.down_blocks for block in stage.children() for layer in parts(block)]
        return [as_layer(self.conv_in), *inner, Conv(self.conv_out, self.shortcut)]


class Decoder(nn.Module):
    """Raw latent (B,C,h,w) -> image (B,3,h*f,w*f). Attribute names are diffusers' key names."""

    def __init__(self, config: DCAEConfig, operations: Any, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        widths, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        interpolate = config.upsample_block_type == "interpolate"
        self.shortcut, self.act = config.decoder_in_shortcut, config.decoder_conv_act_fn
        self.conv_in = conv3x3(operations, config.latent_channels, widths[-1], **factory_kwargs)
        self.up_blocks = nn.ModuleList()
        for stage, count in enumerate(layers):
            blocks = [make_block(config, "decoder", stage, operations, dtype, device) for _ in range(count)]
            if count and stage < len(widths) - 1:
                blocks.insert(0, Up(widths[stage + 1], widths[stage], interpolate, True, operations, **factory_kwargs))
            self.up_blocks.append(nn.Sequential(*blocks))
        last = widths[0] if layers[0] else widths[1]
        self.norm_out = RMSNorm(last, **factory_kwargs)
        if layers[0]:
            self.conv_out = conv3x3(operations, last, config.in_channels, **factory_kwargs)
        else:
            self.conv_out = Up(last, config.in_channels, interpolate, False, operations, **factory_kwargs)

    def layers(self) -> list[Layer]:
        inner = [layer for stage in reversed(self.up_blocks) for block in stage.children() for layer in parts(block)]
        tail = [Head(self.norm_out, self.act), as_layer(self.conv_out)]
        return [Conv(self.conv_in, self.shortcut), *inner, *tail]


def parts(block: nn.Module) -> list[Layer]:
    if isinstance(block, EfficientViTBlock):
        return [block.attn, block.conv_out]
    assert isinstance(block, Layer)
    return [block]


def as_layer(module: nn.Module) -> Layer:
    return module if isinstance(module, Layer) else Conv(module)


class DCAE(nn.Module):
    """A DC-AE. The state dict has diffusers' key names.

    `operations` supplies Conv2d and Linear (torch.nn, or comfy.ops classes), `dtype` / `device` go to every parameter.
    """

    def __init__(
        self, config: DCAEConfig, operations: Any = nn, dtype: torch.dtype | None = None, device: Device = None
    ) -> None:
        super().__init__()
        self.config = config
        self.rgb_factors: tuple[tuple[float, float, float], ...] | None = None  # live preview of a scaled latent
        self.rgb_bias: tuple[float, float, float] | None = None
        self.encoder = Encoder(config, operations, dtype, device)
        self.decoder = Decoder(config, operations, dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.decoder.conv_in.weight
        return weight.dtype

    @property
    def latent_space(self) -> LatentSpace:
        """Name, scale and preview factors of the latent, for adapters and diffusion models."""
        c = self.config
        if c.scaling_factor is None:
            raise DCAEError(f"DC-AE {c.name!r} has no known scaling_factor; pass scaling_factor= when loading it")
        return LatentSpace(
            c.name, c.latent_channels, c.spatial_factor, c.scaling_factor, 0.0, self.rgb_factors, self.rgb_bias
        )

    def encode(
        self,
        image: Tensor,
        strip: int | str | None = None,
        *,
        columns: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Image (B,3,H,W) in -1..1, H and W multiples of f -> raw (unscaled) latent (B,C,H/f,W/f).

        strip: latent rows computed at a time, which bounds memory and changes nothing else; None = whole batch at
        once, "auto" = as many as free memory allows. columns: latent columns at a time, for images whose single
        strip is too wide. progress(done, total, rows) is called as work proceeds and may raise to cancel.
        """
        check_image(image, self.config)
        return self._run("encode", image, strip, columns, progress)

    def decode(
        self,
        latent: Tensor,
        strip: int | str | None = None,
        *,
        columns: int | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Raw (unscaled) latent (B,C,h,w) -> image (B,3,h*f,w*f), about -1..1, not clamped.

        Options as for encode; progress gets finished image rows (1,3,n,W), top to bottom, unless columns is set.
        """
        check_latent(latent, self.config)
        return self._run("decode", latent, strip, columns, progress)

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct: decode(encode(image))."""
        return self.decode(self.encode(image))

    def chain(self, direction: str) -> Chain:
        """The layers of "encode" or "decode", in order."""
        layers = self.encoder.layers() if direction == "encode" else self.decoder.layers()
        return Chain(self.config, direction, layers)

    def _run(
        self, direction: str, x: Tensor, strip: int | str | None, columns: int | None, progress: Progress | None
    ) -> Tensor:
        chain = self.chain(direction)
        layers = chain.layers
        h, w = (side // (self.config.spatial_factor if direction == "encode" else 1) for side in x.shape[2:])
        if strip == "auto":
            cache = CPU_WORKING_BYTES if x.device.type == "cpu" else None
            strip, columns = chain.choose_strip(h, w, self.dtype, free_memory(x.device), cache)
            strip = h if strip is None and x.shape[0] > 1 else strip  # the estimate is for one image
        check_strip(strip, columns)
        if strip is not None and self.training and any(isinstance(m, nn.BatchNorm2d) for m in self.modules()):
            raise DCAEError("strips need fixed normalisation: call eval() on this DC-AE, or train it with strip=None")
        width = x.shape[3] if columns is None else min(x.shape[3], columns * (x.shape[3] // w))
        limit = budget(layers, width, strip) if isinstance(strip, int) else whole_budget(layers, x.shape)
        meter = Meter(layers, x.shape, 1 if strip is None else x.shape[0], progress)
        images = [x] if strip is None else x.split(1)
        if len(images) == 1:
            return self._one_image(chain, images[0], limit, columns, meter)
        return batched((self._one_image(chain, image, limit, columns, meter) for image in images), len(images))

    def _one_image(self, chain: Chain, x: Tensor, limit: int, columns: int | None, meter: Meter) -> Tensor:
        layers = chain.layers
        if columns is None:
            return run(layers, x, self.dtype, limit, meter)
        cut = chain.local_part(x.shape[3])
        if chain.direction == "decode":
            middle = run(layers[:cut], x, self.dtype, limit, meter) if cut else x
            return run_panels(layers[cut:], middle, self.dtype, limit, columns * middle.shape[3] // x.shape[3], meter)
        middle = run_panels(layers[:cut], x, self.dtype, limit, columns * self.config.spatial_factor, meter)
        return run(layers[cut:], middle, self.dtype, limit, meter) if layers[cut:] else middle


def check_image(image: Tensor, config: DCAEConfig) -> None:
    f = config.spatial_factor
    if image.ndim != 4 or image.shape[1] != config.in_channels:
        raise DCAEError(f"DC-AE encode: got shape {tuple(image.shape)}, expected (B, {config.in_channels}, H, W)")
    if image.shape[2] % f or image.shape[3] % f or 0 in image.shape:
        raise DCAEError(
            f"DC-AE {config.name!r} encodes sizes that are multiples of {f}; the image is {image.shape[3]}x"
            f"{image.shape[2]}. Crop or resize it to {image.shape[3] // f * f}x{image.shape[2] // f * f}"
        )


def check_strip(strip: int | str | None, columns: int | None) -> None:
    for name, value in (("strip", strip), ("columns", columns)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise DCAEError(f"DC-AE {name} is {value!r}, expected a whole number of latent pixels from 1 up, or None")
    if columns is not None and strip is None:
        raise DCAEError("DC-AE columns= needs strip=: give the latent rows at a time, too")


def check_latent(latent: Tensor, config: DCAEConfig) -> None:
    if latent.ndim != 4 or 0 in latent.shape:
        raise DCAEError(f"DC-AE decode: got shape {tuple(latent.shape)}, expected (B, {config.latent_channels}, h, w)")
    if latent.shape[1] != config.latent_channels:
        raise DCAEError(
            f"DC-AE {config.name!r} decodes latents of {config.latent_channels} channels, this one has "
            f"{latent.shape[1]}: it was made by another autoencoder. Decode it with that one, or sample it with a "
            "model on this one (Apply DC-Gen)"
        )

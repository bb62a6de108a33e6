"""The local layers of a DC-AE as streams of image rows: convolutions, norms, residual blocks, resampling.

Every layer is a generator that takes chunks of rows and yields chunks of rows; a 3x3 convolution carries the last two
rows it saw, so nothing is computed twice and the result does not depend on where the chunks are cut.
"""

# B batch, C channels, H W rows and columns at the layer's own resolution, N = H*W tokens, f spatial factor

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stream import Chunks, Handover, Window, has_spare_rows, in_rows, with_spare_rows

Device = torch.device | str | None

FP16_MAX = 65504.0
FOLD_MAX = 512 * 512  # input times output channels
KEEP_SHARE = 2
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "mish": F.mish,
}
# Those that can write into another tensor; gelu's does not heed how that lies in memory.
ACTIVATIONS_INTO: dict[str, Callable[..., Tensor]] = {
    "silu": torch.ops.aten.silu.out,
    "relu": torch.ops.aten.relu.out,
    "mish": torch.ops.aten.mish.out,
}


def finite(x: Tensor) -> Tensor:
    """Saturate float16 instead of overflowing to inf (inf - inf is the NaN behind a black image)."""
    if x.dtype != torch.float16:
        return x
    return x.clamp(-FP16_MAX, FP16_MAX) if x.requires_grad else x.clamp_(-FP16_MAX, FP16_MAX)


def activate(name: str, x: Tensor) -> Tensor:
    function = ACTIVATIONS[name]
    if x.requires_grad or name == "gelu":
        return function(x)
    return function(x, inplace=True)


def activated(name: str, x: Tensor) -> Tensor:
    """The activation of x, with spare rows where the Window after it can use them; may overwrite x."""
    if x.requires_grad or x.shape[0] > 1 or name not in ACTIVATIONS_INTO:
        return activate(name, x)
    out = with_spare_rows(x.shape, x)
    ACTIVATIONS_INTO[name](x, out=out)
    return out


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y, with spare rows where the Window after it can use them; may overwrite x."""
    if x.requires_grad or y.requires_grad:
        return x + y
    if x.shape[0] > 1 or has_spare_rows(x):
        return x.add_(y)
    return torch.add(x, y, out=with_spare_rows(x.shape, x))


class RMSNorm(nn.Module):
    """y = x / sqrt(mean_C(x^2) + eps) * weight + bias over channels; mean and root in float32. Overwrites x."""

    def __init__(
        self, channels: int, dtype: torch.dtype | None = None, device: Device = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype, device=device))

    def forward(self, x: Tensor, residual: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """x (B,C,H,W); `residual` of the same shape is added after the norm; `eps` (B,1,H,W) replaces self.eps."""
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[1] + (self.eps if eps is None else eps))
        weight, bias = (value.to(x).view(1, -1, 1, 1) for value in (self.weight, self.bias))
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            y = torch.addcmul(bias, (x * scale).to(x.dtype), weight)
            return finite(y if residual is None else y + residual)
        torch.mul(x, scale, out=x)  # computed in float32, without a float32 copy of x
        torch.addcmul(bias, x, weight, out=x)
        return finite(x if residual is None else added(x, residual))


class ChannelNorm(nn.BatchNorm2d):
    """BatchNorm with the call of RMSNorm (only decoder stages 0-2 of the in / mix families use it)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return finite(y if residual is None else added(y, residual))


def make_norm(kind: str, channels: int, dtype: torch.dtype | None, device: Device) -> RMSNorm | ChannelNorm:
    if kind == "rms_norm":
        return RMSNorm(channels, dtype=dtype, device=device)
    return ChannelNorm(channels, dtype=dtype, device=device)


def plain(layer: Any) -> bool:
    """Whether a layer's weight may be used directly: ComfyUI's layers may have to cast or patch it on every call."""
    return not (
        getattr(layer, "comfy_cast_weights", False)
        or getattr(layer, "weight_function", None)
        or getattr(layer, "bias_function", None)
    )


def pointwise(layer: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution, as a matrix product (in channels_last that needs no copy)."""
    if not plain(layer):
        return finite(layer(x))
    weight = layer.weight.flatten(1)
    if x.shape[0] > 1 or x.dtype != weight.dtype or x.requires_grad or weight.requires_grad:
        return finite(F.linear(x.movedim(1, -1), weight, layer.bias)).movedim(-1, 1)
    out = with_spare_rows((1, len(weight), *x.shape[2:]), x)
    tokens, result = x.movedim(1, -1).reshape(-1, x.shape[1]), out.movedim(1, -1).view(-1, out.shape[1])
    if layer.bias is None:
        torch.mm(tokens, weight.T, out=result)
    else:
        torch.addmm(layer.bias, tokens, weight.T, out=result)
    return finite(out)


def conv3x3(operations: Any, c_in: int, c_out: int, **kwargs: Any) -> Any:
    """A 3x3 convolution which pads columns only: the rows around a chunk come from its Window."""
    return operations.Conv2d(c_in, c_out, 3, padding=(0, 1), **kwargs)


class Layer:
    """One step of the stream. `stream` maps chunks of an input of `height` rows to chunks of the output.

    For planning: `live` elements are alive per input pixel of a chunk while the layer works on it, `held` per input
    pixel of the whole image; `scale` is output size / input size; `work` multiply-adds per input pixel.
    """

    channels: int  # of the input
    live: int
    work: int
    held: int = 0
    kept: int = 0  # as held, but only if the whole of it is less than the limit / KEEP_SHARE
    fixed: int = 0  # whatever the size
    carried: int = 0  # elements per input column that wait between chunks
    scale: float = 1.0
    reach: int = 1  # input pixels on either side that one output pixel depends on, local layers

    def stream(self, chunks: Chunks, height: int, limit: int) -> Chunks:
        """`limit`: elements this layer may keep alive."""
        step = self.stepper()
        return Handover(lambda rows: step(*rows), in_rows(chunks, height))

    def size(self, pixels: int) -> int:
        """Output rows (or columns) of an image with this many input rows (or columns)."""
        return int(pixels * self.scale)

    def halo(self, pixels: int) -> int:
        """Input pixels beyond an edge that the output within `pixels` of that edge depends on."""
        return math.ceil(pixels / self.scale) + self.reach

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        """A function with fresh row memory: (chunk, is it the last) -> output rows or None if none is complete."""
        raise NotImplementedError


class Conv(Layer):
    """The plain first / last 3x3 convolution; `shortcut` adds the channel-group mean or the repeated channels."""

    def __init__(self, conv: Any, shortcut: bool = False) -> None:
        self.conv, self.shortcut = conv, shortcut
        self.channels = conv.in_channels
        self.live = 3 * conv.in_channels + 3 * conv.out_channels
        self.carried = 2 * conv.in_channels
        self.work = conv.weight.numel()

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        window = Window(3, 1, 1, 1)

        def step(x: Tensor, last: bool) -> Tensor | None:
            rows = window(x, last)
            if rows is None:
                return None
            y = finite(self.conv(rows))
            if self.shortcut:
                y = finite(added(y, channel_shortcut(rows[:, :, 1:-1], y.shape[1])))
            return y

        return step


def channel_shortcut(x: Tensor, channels: int) -> Tensor:
    """Match channel counts: mean over consecutive groups, or each channel repeated."""
    if channels <= x.shape[1]:
        groups: Tensor = x.unflatten(1, (channels, -1))
        return groups.mean(2)
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def unshuffle_shortcut(x: Tensor, channels: int) -> Tensor:
    """Pixel-unshuffle by 2, then the mean over consecutive groups of the 4C channels, without the 4C tensor."""
    group = 4 * x.shape[1] // channels
    if group % 4 == 0:
        return channel_shortcut(F.avg_pool2d(x, 2), channels)
    if group == 2:  # a group is the two neighbours in a row
        pairs: Tensor = F.avg_pool2d(x, (1, 2)).unflatten(2, (-1, 2))
        return pairs.movedim(3, 2).flatten(1, 2)
    return channel_shortcut(F.pixel_unshuffle(x, 2), channels)


class ResBlock(nn.Module, Layer):
    """x + norm(conv(act(conv(x)))), local: two rows on either side."""

    def __init__(
        self, channels: int, norm: str, act: str, operations: Any, dtype: torch.dtype | None, device: Device
    ) -> None:
        super().__init__()
        self.act = act
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.conv1 = conv3x3(operations, channels, channels, **factory_kwargs)
        self.conv2 = conv3x3(operations, channels, channels, bias=False, **factory_kwargs)
        self.norm = make_norm(norm, channels, dtype, device)
        self.channels = channels
        self.live, self.work, self.reach = 5 * channels, 2 * self.conv1.weight.numel(), 2
        self.carried = 4 * channels

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        first, second = Window(3, 1, 1, 1), Window(3, 1, 1, 1)
        done = {"middle": 0, "out": 0}

        def step(x: Tensor, last: bool) -> Tensor | None:
            rows = first(x, last)
            if rows is None:
                return None
            top = done["middle"] - 1  # image row of rows[0]
            middle = activated(self.act, finite(self.conv1(rows)))
            done["middle"] += middle.shape[2]
            around = second(middle, last)
            del middle
            if around is None:
                return None
            y = finite(self.conv2(around))
            del around
            start = done["out"] - top
            done["out"] += y.shape[2]
            normed: Tensor = self.norm(y, residual=rows[:, :, start : start + y.shape[2]])
            return normed

        return step


class Down(nn.Module, Layer):
    """Halve the size: 3x3 conv to C_out/4 then pixel-unshuffle, or a strided 3x3 conv; shortcut averages channels."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        unshuffle: bool,
        shortcut: bool,
        operations: Any,
        dtype: torch.dtype | None,
        device: Device,
    ) -> None:
        super().__init__()
        self.unshuffle, self.shortcut, self.c_out = unshuffle, shortcut, c_out
        width, stride = (c_out // 4, 1) if unshuffle else (c_out, 2)
        self.conv = conv3x3(operations, c_in, width, stride=stride, dtype=dtype, device=device)
        self.channels = c_in
        self.scale, self.live, self.carried = 0.5, 3 * c_in + c_out, 3 * c_in
        self.work = self.conv.weight.numel() // stride**2

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        window = Window(4, 2, 1, 1) if self.unshuffle else Window(3, 2, 1, 0)

        def step(x: Tensor, last: bool) -> Tensor | None:
            rows = window(x, last)
            if rows is None:
                return None
            y = self.conv(rows)
            y = finite(F.pixel_unshuffle(y, 2) if self.unshuffle else y)
            if self.shortcut:
                y = finite(added(y, unshuffle_shortcut(rows[:, :, 1 : 1 + 2 * y.shape[2]], self.c_out)))
            return y

        return step


class Up(nn.Module, Layer):
    """Double the size: 3x3 conv to 4*C_out then pixel-shuffle, or nearest x2 then 3x3; shortcut repeats channels."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        interpolate: bool,
        shortcut: bool,
        operations: Any,
        dtype: torch.dtype | None,
        device: Device,
    ) -> None:
        super().__init__()
        self.interpolate, self.shortcut, self.c_out = interpolate, shortcut, c_out
        self.conv = conv3x3(operations, c_in, c_out if interpolate else 4 * c_out, dtype=dtype, device=device)
        self.channels = c_in
        self.scale, self.live, self.carried = 2.0, 4 * c_in + 16 * c_out, 2 * c_in
        self.work = self.conv.weight.numel() * (4 if interpolate else 1)
        # folded kernels are 16/9 of the weights: not worth it for the wide layers, which see few pixels
        self.fold = interpolate and c_in * c_out <= FOLD_MAX
        self.fixed = 24 * c_in * c_out if self.fold else 0

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        window = Window(3, 1, 1, 1)
        folded: list[list[Tensor]] | None = None

        def step(x: Tensor, last: bool) -> Tensor | None:
            nonlocal folded
            rows = window(x, last)
            if rows is None:
                return None
            if folded is None and self.fold and plain(self.conv):
                folded = fold_nearest(self.conv.weight)
            if folded is not None:
                return self.finish(conv_nearest(rows, folded, self.conv.bias), rows)
            if self.interpolate:
                return self.finish(self.conv(F.interpolate(rows, scale_factor=2, mode="nearest")[:, :, 1:-1]), rows)
            y = self.conv(rows)
            if self.shortcut:
                inner = rows[:, :, 1:-1].unsqueeze(2)
                y = (finite(y).unflatten(1, (x.shape[1], -1)) + inner).flatten(1, 2)
            return F.pixel_shuffle(finite(y), 2)

        return step

    def finish(self, y: Tensor, rows: Tensor) -> Tensor:
        y = finite(y)
        return finite(with_repeated(y, rows[:, :, 1:-1])) if self.shortcut else y


def with_repeated(y: Tensor, x: Tensor) -> Tensor:
    """y (B,C,2H,2W) + pixel-shuffle of x (B,Cx,H,W) with each channel repeated 4C/Cx times; may overwrite y."""
    repeats = 4 * y.shape[1] // x.shape[1]
    if y.requires_grad or x.requires_grad or (repeats % 4 and 4 % repeats):
        return y + F.pixel_shuffle(x.repeat_interleave(repeats, dim=1), 2)
    for position in range(4):  # of the four pixels that one becomes: channel 4c + position of the repeated ones
        if repeats % 4:
            part = x[:, position // repeats :: 4 // repeats]
        else:
            part = x.repeat_interleave(repeats // 4, dim=1) if repeats > 4 else x
        y[:, :, position // 2 :: 2, position % 2 :: 2] += part
    return y


def fold_nearest(weight: Tensor) -> list[list[Tensor]]:
    """3x3 after nearest x2 is a 2x2 convolution of the small image for each of the four output positions.

    Rows 2i-1, 2i, 2i+1 of the large image are rows i-1, i, i of the small one; 2i, 2i+1, 2i+2 are i, i, i+1.
    Returns kernels [row parity][column parity]: 4/9 of the multiplications.
    """
    first = torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2)
    second = torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2)
    return [
        [
            torch.stack([kernel[..., 0], kernel[..., 1] + kernel[..., 2]], 3),
            torch.stack([kernel[..., 0] + kernel[..., 1], kernel[..., 2]], 3),
        ]
        for kernel in (first, second)
    ]


def conv_nearest(rows: Tensor, kernels: list[list[Tensor]], bias: Tensor | None) -> Tensor:
    """Apply fold_nearest's kernels to (B,C,H+2,W): result (B,C_out,2H,2W)."""
    height, width = rows.shape[2] - 2, rows.shape[3]
    # the padded 2x2 convolution has one column too many: the last for the left position, the first for the right
    quarters = (
        (dy, dx, F.conv2d(rows[:, :, dy : dy + height + 1], kernel, bias, padding=(0, 1))[..., dx : dx + width])
        for dy, pair in enumerate(kernels)
        for dx, kernel in enumerate(pair)
    )
    if rows.requires_grad or kernels[0][0].requires_grad:
        return F.pixel_shuffle(torch.stack([quarter for _, _, quarter in quarters], 2).flatten(1, 2), 2)
    out: Tensor | None = None
    for dy, dx, quarter in quarters:
        if out is None:
            out = with_spare_rows((*quarter.shape[:2], 2 * height, 2 * width), quarter)
        out[:, :, dy::2, dx::2] = quarter
        del quarter
    assert out is not None
    return out


class Head(Layer):
    """Decoder tail before the last convolution: norm, then activation. Per pixel, so it needs no rows around it."""

    def __init__(self, norm: RMSNorm, act: str) -> None:
        self.norm, self.act = norm, act
        self.channels = norm.weight.numel()
        self.live, self.work, self.reach = 3 * norm.weight.numel(), norm.weight.numel(), 0

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        return lambda x, last: activate(self.act, self.norm(x))

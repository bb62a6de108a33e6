"""The DC-AE network (arXiv:2410.10733), computed as a stream of image rows.

Every layer is a generator that takes chunks of rows and yields chunks of rows; a 3x3 convolution carries the last two
rows it saw, so nothing is computed twice and the result does not depend on where the chunks are cut. One chunk is the
usual whole-image forward pass (and what training uses). Linear attention is a sum over all pixels: it is accumulated
while the chunks arrive and applied in a second pass, so only its narrow input is ever held whole.
"""

# B batch, C channels, H W rows and columns at the layer's own resolution, N = H*W tokens, f spatial factor

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..latent import LatentSpace
from .config import DCAEConfig, DCAEError
from .plan import (
    CPU_WORKING_BYTES,
    KEEP_SHARE,
    Meter,
    OnStrip,
    budget,
    choose_strip,
    free_memory,
    local_part,
    run,
    run_panels,
    whole_budget,
)
from .stream import Chunks, Collector, Window, drain, in_rows

FP16_MAX = 65504.0
FOLD_MOST = 512 * 512
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "mish": F.mish,
}


def finite(x: Tensor) -> Tensor:
    """Saturate float16 instead of overflowing to inf (inf - inf is the NaN behind a black picture)."""
    if x.dtype != torch.float16:
        return x
    return x.clamp(-FP16_MAX, FP16_MAX) if x.requires_grad else x.clamp_(-FP16_MAX, FP16_MAX)


def activate(name: str, x: Tensor) -> Tensor:
    function = ACTIVATIONS[name]
    if x.requires_grad or name == "gelu":
        return function(x)
    return function(x, inplace=True)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean_C(x^2) + eps) * weight + bias over channels; mean and root in float32. Overwrites x."""

    def __init__(self, channels: int, dtype: Any = None, device: Any = None, eps: float = 1e-5) -> None:
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
        x.mul_(weight).add_(bias)
        return finite(x if residual is None else x.add_(residual))


class ChannelNorm(nn.BatchNorm2d):
    """BatchNorm with the call of RMSNorm (only decoder stages 0-2 of the in / mix families use it)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        return finite(y if residual is None else y + residual)


def make_norm(kind: str, channels: int, dtype: Any, device: Any) -> nn.Module:
    if kind == "rms_norm":
        return RMSNorm(channels, dtype=dtype, device=device)
    return ChannelNorm(channels, dtype=dtype, device=device)


def plain(layer: nn.Module) -> bool:
    """Whether a layer's weight may be used directly: ComfyUI's layers may have to cast or patch it on every call."""
    return not (
        getattr(layer, "comfy_cast_weights", False)
        or getattr(layer, "weight_function", None)
        or getattr(layer, "bias_function", None)
    )


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution, as a matrix product (in channels_last that needs no copy)."""
    if not plain(layer):
        return finite(layer(x))
    return finite(F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias)).movedim(-1, 1)


def conv3x3(operations: Any, c_in: int, c_out: int, **kwargs: Any) -> nn.Module:
    """A 3x3 convolution which pads columns only: the rows around a chunk come from its Window."""
    return operations.Conv2d(c_in, c_out, 3, padding=(0, 1), **kwargs)


class Layer:
    """One step of the stream. `stream` maps chunks of an input of `height` rows to chunks of the output.

    For planning: `live` elements are alive per input pixel of a chunk while the layer works on it, `held` per input
    pixel of the whole picture; `scale` is output size / input size; `work` multiply-adds per input pixel.
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
        for chunk, last in in_rows(chunks, height):
            box = [step(chunk, last)]
            del chunk
            if box[0] is not None:
                yield box.pop()

    def size(self, pixels: int) -> int:
        """Output rows (or columns) of a picture with this many input rows (or columns)."""
        return int(pixels * self.scale)

    def halo(self, pixels: int) -> int:
        """Input pixels beyond an edge that the output within `pixels` of that edge depends on."""
        return math.ceil(pixels / self.scale) + self.reach

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        """A function with fresh row memory: (chunk, is it the last) -> output rows or None if none is complete."""
        raise NotImplementedError


class Conv(Layer):
    """The plain first / last 3x3 convolution; `shortcut` adds the channel-group mean or the repeated channels."""

    def __init__(self, conv: nn.Module, shortcut: bool = False) -> None:
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
                y = finite(y + channel_shortcut(rows[:, :, 1:-1], y.shape[1]))
            return y

        return step


def channel_shortcut(x: Tensor, channels: int) -> Tensor:
    """Match channel counts: mean over consecutive groups, or each channel repeated."""
    if channels <= x.shape[1]:
        return x.unflatten(1, (channels, -1)).mean(2)
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def unshuffle_shortcut(x: Tensor, channels: int) -> Tensor:
    """Pixel-unshuffle by 2, then the mean over consecutive groups of the 4C channels, without the 4C tensor."""
    group = 4 * x.shape[1] // channels
    if group % 4 == 0:
        return channel_shortcut(F.avg_pool2d(x, 2), channels)
    if group == 2:  # a group is the two neighbours in a row
        return F.avg_pool2d(x, (1, 2)).unflatten(2, (-1, 2)).movedim(3, 2).flatten(1, 2)
    return channel_shortcut(F.pixel_unshuffle(x, 2), channels)


class ResBlock(nn.Module, Layer):
    """x + norm(conv(act(conv(x)))), local: two rows on either side."""

    def __init__(self, channels: int, norm: str, act: str, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.act = act
        kwargs = {"dtype": dtype, "device": device}
        self.conv1 = conv3x3(operations, channels, channels, **kwargs)
        self.conv2 = conv3x3(operations, channels, channels, bias=False, **kwargs)
        self.norm = make_norm(norm, channels, dtype, device)
        self.channels = channels
        self.live, self.work, self.reach = 6 * channels, 2 * self.conv1.weight.numel(), 2
        self.carried = 4 * channels

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        first, second = Window(3, 1, 1, 1), Window(3, 1, 1, 1)
        done = {"middle": 0, "out": 0}

        def step(x: Tensor, last: bool) -> Tensor | None:
            rows = first(x, last)
            if rows is None:
                return None
            top = done["middle"] - 1  # picture row of rows[0]
            middle = activate(self.act, finite(self.conv1(rows)))
            done["middle"] += middle.shape[2]
            middle = second(middle, last)
            if middle is None:
                return None
            y = finite(self.conv2(middle))
            del middle
            start = done["out"] - top
            done["out"] += y.shape[2]
            return self.norm(y, residual=rows[:, :, start : start + y.shape[2]])

        return step


class Attention(nn.Module, Layer):
    """x + norm(out(multi-scale ReLU linear attention)). Global: reads its input twice, keeps only sums.

    to_q / to_k / to_v hold thirds of one projection whose rows are [q, k, v] per head, as published; they are not the
    queries, keys and values.
    """

    def __init__(
        self, channels: int, head_dim: int, scales: tuple[int, ...], norm: str, operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, 1e-15
        kwargs = {"dtype": dtype, "device": device}
        inner = channels // head_dim * head_dim
        self.to_q = operations.Linear(channels, inner, bias=False, **kwargs)
        self.to_k = operations.Linear(channels, inner, bias=False, **kwargs)
        self.to_v = operations.Linear(channels, inner, bias=False, **kwargs)
        self.to_qkv_multiscale = nn.ModuleList(
            AttentionScale(inner, head_dim, size, operations, dtype, device) for size in scales
        )
        self.to_out = operations.Linear(inner * (1 + len(scales)), channels, bias=False, **kwargs)
        self.norm_out = make_norm(norm, channels, dtype, device)
        self.channels = channels
        self.live, self.held = (16 + 14 * len(scales)) * channels, channels
        self.fixed = 3 * inner * channels  # the joined projection
        self.kept, self.carried = self.to_out.in_features, 6 * self.margin * channels
        self.work = sum(weight.numel() for weight in self.parameters())

    @property
    def margin(self) -> int:
        """Rows on either side that the widest scale looks at."""
        return max((scale.size // 2 for scale in self.to_qkv_multiscale), default=0)

    def stream(self, chunks: Chunks, height: int, limit: int) -> Chunks:
        source, sums, held = Collector(height), None, []
        project, rows, keep = self.projection(), 0, None
        for chunk, last in in_rows(chunks, height):
            if keep is None:  # a small picture's queries are kept, a large one's are computed again
                keep = self.to_out.in_features * height * chunk.shape[3] * chunk.shape[0] <= limit // KEEP_SHARE
            rows = max(rows, chunk.shape[2])
            source.add(chunk)
            pieces = project(chunk, last)
            del chunk
            if pieces is not None:
                part = [self.summed(piece) for piece in pieces]
                sums = part if sums is None else [old + new for old, new in zip(sums, part, strict=True)]
                if keep:
                    held.append([piece[:, :, 0].clone() for piece in pieces])
            del pieces
        del project
        whole = source.take()
        assert sums is not None
        done = 0
        for query in drain(held) if keep else self.again(whole, rows, height):
            count = query[0].shape[2] // whole.shape[3]
            box = [self.mix(sums, query, whole[:, :, done : done + count])]
            done += count
            del query
            if done == height:
                del whole
            yield box.pop()

    def again(self, whole: Tensor, rows: int, height: int) -> Iterator[list[Tensor]]:
        """The queries of the whole input, a chunk at a time."""
        project = self.projection()
        for chunk, last in in_rows(iter(whole.split(rows, 2)), height):
            pieces = project(chunk, last)
            if pieces is not None:
                box = [[piece[:, :, 0] for piece in pieces]]
                del pieces
                yield box.pop()

    def projection(self) -> Callable[[Tensor, bool], list[Tensor] | None]:
        """A function with fresh row memory: rows -> one (B, heads, 3, N, head_dim) of q, k, v per scale."""
        window = Window(2 * self.margin + 1, 1, self.margin, self.margin)
        thirds = [self.to_q, self.to_k, self.to_v]
        weight = torch.cat([layer.weight for layer in thirds]) if all(map(plain, thirds)) else None

        def project(x: Tensor, last: bool) -> list[Tensor] | None:
            tokens = x.movedim(1, -1)
            fused = weight is not None
            qkv = F.linear(tokens, weight) if fused else torch.cat([layer(tokens) for layer in thirds], -1)
            rows = window(finite(qkv).movedim(-1, 1), last)
            del tokens, qkv
            if rows is None:
                return None
            center = rows[:, :, self.margin : rows.shape[2] - self.margin].movedim(1, -1).flatten(1, 2)
            pieces = [center.unflatten(2, (-1, 3, self.head_dim)).permute(0, 2, 3, 1, 4)]
            for scale in self.to_qkv_multiscale:
                skip = self.margin - scale.size // 2
                groups = scale(rows[:, :, skip : rows.shape[2] - skip])
                pieces.append(groups.unflatten(1, (-1, 3)))
            return pieces

        return project

    def summed(self, piece: Tensor) -> Tensor:
        """k^T [v, 1]: numerator and normaliser of linear attention as one (B, heads, head_dim, head_dim + 1)."""
        key, value = F.relu(piece[:, :, 1].float()), piece[:, :, 2].float()
        return torch.cat([key.transpose(-1, -2) @ value, key.sum(-2)[..., None]], -1)

    def mix(self, sums: list[Tensor], queries: list[Tensor], x: Tensor) -> Tensor:
        mixed = []
        for part, query in zip(sums, queries, strict=True):
            both = F.relu(query.float()) @ part
            share = both[..., :-1] / (both[..., -1:] + self.eps)
            mixed.append(share.to(x.dtype).transpose(1, 2))
            del both, share
        tokens = torch.stack(mixed, 2).flatten(2)
        del mixed
        y = finite(self.to_out(tokens)).unflatten(1, (x.shape[2], x.shape[3])).movedim(-1, 1)
        return self.norm_out(y, residual=x)


class AttentionScale(nn.Module):
    """Depthwise k x k, then 1x1 per third of a head (arXiv:2205.14756, multi-scale tokens)."""

    def __init__(self, inner: int, head_dim: int, size: int, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.size, self.head_dim = size, head_dim
        kwargs = {"bias": False, "dtype": dtype, "device": device}
        channels = 3 * inner
        self.proj_in = operations.Conv2d(channels, channels, size, padding=(0, size // 2), groups=channels, **kwargs)
        self.proj_out = operations.Conv2d(channels, channels, 1, groups=channels // head_dim, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3 * inner, H + size - 1, W) -> (B, 3 * heads, H * W, head_dim)."""
        x = finite(self.proj_in(x))
        if not plain(self.proj_out):
            return finite(self.proj_out(x)).flatten(2).unflatten(1, (-1, self.head_dim)).transpose(2, 3)
        weight = self.proj_out.weight.view(-1, self.head_dim, self.head_dim)
        groups = x.movedim(1, -1).flatten(1, 2).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return finite(groups @ weight.transpose(1, 2))


class GLUMBConv(nn.Module, Layer):
    """x + norm(point(u * silu(g))), [u, g] = depth3x3(silu(expand(x))); the hidden width is 2 * 4C."""

    def __init__(self, channels: int, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        hidden = 4 * channels
        self.conv_inverted = operations.Conv2d(channels, 2 * hidden, 1, **kwargs)
        self.conv_depth = conv3x3(operations, 2 * hidden, 2 * hidden, groups=2 * hidden, **kwargs)
        self.conv_point = operations.Conv2d(hidden, channels, 1, bias=False, **kwargs)
        self.norm = RMSNorm(channels, **kwargs)
        self.channels = channels
        self.live, self.work = 28 * channels, sum(weight.numel() for weight in self.parameters())
        self.carried = 18 * channels

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        window, narrow = Window(3, 1, 1, 1), Window(3, 1, 1, 1)

        def step(x: Tensor, last: bool) -> Tensor | None:
            residual = narrow(x, last)
            wide = window(activate("silu", pointwise(self.conv_inverted, x)), last)
            if wide is None or residual is None:
                return None
            value, gate = finite(self.conv_depth(wide)).chunk(2, 1)
            del wide
            return self.project(value, gate, residual[:, :, 1:-1])

        return step

    def project(self, value: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        if value.dtype != torch.float16:
            hidden = value * F.silu(gate) if value.requires_grad else F.silu(gate).mul_(value)
            return self.norm(pointwise(self.conv_point, hidden), residual=residual)
        # The product of two float16 numbers overflows. The norm forgets the scale of a pixel (up to its eps), so
        # shrink each pixel into range before the projection and let eps know.
        product = value.float() * F.silu(gate.float())
        shrink = (FP16_MAX / 64 / product.abs().amax(1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)
        y = pointwise(self.conv_point, (product * shrink).to(value.dtype))
        return self.norm(y, residual=residual, eps=self.norm.eps * shrink.square())


class EfficientViTBlock(nn.Module):
    """Attention, then the gated convolution; each with its own residual."""

    def __init__(
        self, channels: int, head_dim: int, scales: tuple[int, ...], norm: str, operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        self.attn = Attention(channels, head_dim, scales, norm, operations, dtype, device)
        self.conv_out = GLUMBConv(channels, operations, dtype, device)


class Down(nn.Module, Layer):
    """Halve the size: 3x3 conv to C_out/4 then pixel-unshuffle, or a strided 3x3 conv; shortcut averages channels."""

    def __init__(
        self, c_in: int, c_out: int, unshuffle: bool, shortcut: bool, operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        self.unshuffle, self.shortcut, self.c_out = unshuffle, shortcut, c_out
        width, stride = (c_out // 4, 1) if unshuffle else (c_out, 2)
        self.conv = conv3x3(operations, c_in, width, stride=stride, dtype=dtype, device=device)
        self.channels = c_in
        self.scale, self.live, self.carried = 0.5, 5 * c_in + 2 * c_out, 3 * c_in
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
                y = finite(y + unshuffle_shortcut(rows[:, :, 1 : 1 + 2 * y.shape[2]], self.c_out))
            return y

        return step


class Up(nn.Module, Layer):
    """Double the size: 3x3 conv to 4*C_out then pixel-shuffle, or nearest x2 then 3x3; shortcut repeats channels."""

    def __init__(
        self, c_in: int, c_out: int, interpolate: bool, shortcut: bool, operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        self.interpolate, self.shortcut, self.c_out = interpolate, shortcut, c_out
        self.conv = conv3x3(operations, c_in, c_out if interpolate else 4 * c_out, dtype=dtype, device=device)
        self.channels = c_in
        self.scale, self.live, self.carried = 2.0, 4 * c_in + 16 * c_out, 2 * c_in
        self.work = self.conv.weight.numel() * (4 if interpolate else 1)
        # folded kernels are 16/9 of the weights: not worth it for the wide layers, which see few pixels
        self.fold = interpolate and c_in * c_out <= FOLD_MOST
        self.fixed = 24 * c_in * c_out if self.fold else 0

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        window = Window(3, 1, 1, 1)
        folded = fold_nearest(self.conv.weight) if self.fold and plain(self.conv) else None

        def step(x: Tensor, last: bool) -> Tensor | None:
            rows = window(x, last)
            if rows is None:
                return None
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
        if not self.shortcut:
            return finite(y)
        repeats = 4 * self.c_out // rows.shape[1]
        return finite(finite(y) + F.pixel_shuffle(rows[:, :, 1:-1].repeat_interleave(repeats, dim=1), 2))


def fold_nearest(weight: Tensor) -> list[list[Tensor]]:
    """3x3 after nearest x2 is a 2x2 convolution of the small picture for each of the four output positions.

    Rows 2i-1, 2i, 2i+1 of the large picture are rows i-1, i, i of the small one; 2i, 2i+1, 2i+2 are i, i, i+1.
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
    lines = []
    for dy, pair in enumerate(kernels):
        part = rows[:, :, dy : dy + height + 1]
        halves = [F.conv2d(part, kernel, bias, padding=(0, 1)) for kernel in pair]
        # the padded 2x2 convolution has one column too many: the last for the left position, the first for the right
        lines.append(torch.stack([halves[0][..., :width], halves[1][..., 1:]], 4).flatten(3))
    return torch.stack(lines, 3).flatten(2, 3)


class Head(Layer):
    """Decoder tail before the last convolution: norm, then activation. Per pixel, so it needs no rows around it."""

    def __init__(self, norm: RMSNorm, act: str) -> None:
        self.norm, self.act = norm, act
        self.channels = norm.weight.numel()
        self.live, self.work, self.reach = 3 * norm.weight.numel(), norm.weight.numel(), 0

    def stepper(self) -> Callable[[Tensor, bool], Tensor | None]:
        return lambda x, last: activate(self.act, self.norm(x))


def make_block(config: DCAEConfig, side: str, stage: int, operations: Any, dtype: Any, device: Any) -> nn.Module:
    channels = getattr(config, f"{side}_block_out_channels")[stage]
    norm = config.decoder_norm_types[stage] if side == "decoder" else "rms_norm"
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        act = config.decoder_act_fns[stage] if side == "decoder" else "silu"
        return ResBlock(channels, norm, act, operations, dtype, device)
    scales = getattr(config, f"{side}_qkv_multiscales")[stage]
    return EfficientViTBlock(channels, config.attention_head_dim, scales, norm, operations, dtype, device)


class Encoder(nn.Module):
    """Image (B,3,H,W) -> raw latent (B,C,H/f,W/f). Attribute names are diffusers' key names."""

    def __init__(self, config: DCAEConfig, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.shortcut = config.encoder_out_shortcut
        if layers[0]:
            self.conv_in = conv3x3(operations, config.in_channels, widths[0], **kwargs)
        else:
            self.conv_in = Down(config.in_channels, widths[1], unshuffle, False, operations, **kwargs)
        self.down_blocks = nn.ModuleList()
        for stage, count in enumerate(layers):
            blocks = [make_block(config, "encoder", stage, operations, dtype, device) for _ in range(count)]
            if count and stage < len(widths) - 1:
                blocks.append(Down(widths[stage], widths[stage + 1], unshuffle, True, operations, **kwargs))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = conv3x3(operations, widths[-1], config.latent_channels, **kwargs)

    def layers(self) -> list[Layer]:
        inner = [layer for stage in self.down_blocks for block in stage for layer in parts(block)]
        return [as_layer(self.conv_in), *inner, Conv(self.conv_out, self.shortcut)]


class Decoder(nn.Module):
    """Raw latent (B,C,h,w) -> image (B,3,h*f,w*f). Attribute names are diffusers' key names."""

    def __init__(self, config: DCAEConfig, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        widths, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        interpolate = config.upsample_block_type == "interpolate"
        self.shortcut, self.act = config.decoder_in_shortcut, config.decoder_conv_act_fn
        self.conv_in = conv3x3(operations, config.latent_channels, widths[-1], **kwargs)
        self.up_blocks = nn.ModuleList()
        for stage, count in enumerate(layers):
            blocks = [make_block(config, "decoder", stage, operations, dtype, device) for _ in range(count)]
            if count and stage < len(widths) - 1:
                blocks.insert(0, Up(widths[stage + 1], widths[stage], interpolate, True, operations, **kwargs))
            self.up_blocks.append(nn.Sequential(*blocks))
        last = widths[0] if layers[0] else widths[1]
        self.norm_out = RMSNorm(last, **kwargs)
        if layers[0]:
            self.conv_out = conv3x3(operations, last, config.in_channels, **kwargs)
        else:
            self.conv_out = Up(last, config.in_channels, interpolate, False, operations, **kwargs)

    def layers(self) -> list[Layer]:
        inner = [layer for stage in reversed(self.up_blocks) for block in stage for layer in parts(block)]
        tail = [Head(self.norm_out, self.act), as_layer(self.conv_out)]
        return [Conv(self.conv_in, self.shortcut), *inner, *tail]


def parts(block: nn.Module) -> list[Layer]:
    return [block.attn, block.conv_out] if isinstance(block, EfficientViTBlock) else [block]


def as_layer(module: nn.Module) -> Layer:
    return module if isinstance(module, Layer) else Conv(module)


class DCAE(nn.Module):
    """A DC-AE. The state dict has diffusers' key names.

    `operations` supplies Conv2d and Linear (torch.nn, or comfy.ops classes), `dtype` / `device` go to every parameter.
    """

    def __init__(self, config: DCAEConfig, operations: Any = nn, dtype: Any = None, device: Any = None) -> None:
        super().__init__()
        self.config = config
        self.rgb_factors: tuple[tuple[float, float, float], ...] | None = None  # live preview of a scaled latent
        self.rgb_bias: tuple[float, float, float] | None = None
        self.encoder = Encoder(config, operations, dtype, device)
        self.decoder = Decoder(config, operations, dtype, device)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    @property
    def latent_space(self) -> LatentSpace:
        """Name, scale and preview factors of the latent, for adapters and diffusion models."""
        c = self.config
        if c.scaling_factor is None:
            raise DCAEError(f"DC-AE {c.name!r} has no known scaling_factor; pass scaling_factor= when loading it")
        return LatentSpace(
            c.name, c.latent_channels, c.spatial_factor, c.scaling_factor, 0.0, self.rgb_factors, self.rgb_bias
        )

    def save(self, path: str | os.PathLike[str], format: str = "diffusers") -> Path:
        """Write weights (and config.json if `path` is a folder); see save_dcae."""
        from .files import save_dcae

        return save_dcae(self, path, format=format)

    def encode(
        self,
        image: Tensor,
        strip: int | str | None = None,
        *,
        columns: int | None = None,
        on_strip: OnStrip | None = None,
    ) -> Tensor:
        """Image (B,3,H,W) in -1..1, H and W multiples of f -> raw (unscaled) latent (B,C,H/f,W/f).

        strip: latent rows computed at a time, which bounds memory and changes nothing else; None = whole batch at
        once, "auto" = as many as free memory allows. columns: latent columns at a time, for pictures whose single
        strip is too wide. on_strip(done, total, rows) is called as work proceeds and may raise to cancel.
        """
        check_image(image, self.config)
        return self._run("encode", image, strip, columns, on_strip)

    def decode(
        self,
        latent: Tensor,
        strip: int | str | None = None,
        *,
        columns: int | None = None,
        on_strip: OnStrip | None = None,
    ) -> Tensor:
        """Raw (unscaled) latent (B,C,h,w) -> image (B,3,h*f,w*f), about -1..1, not clamped.

        Options as for encode; on_strip gets finished image rows (1,3,n,W), top to bottom, unless columns is set.
        """
        check_latent(latent, self.config)
        return self._run("decode", latent, strip, columns, on_strip)

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct: decode(encode(image))."""
        return self.decode(self.encode(image))

    def layers(self, direction: str) -> list[Layer]:
        """The chain of layers of "encode" or "decode", in order."""
        return self.encoder.layers() if direction == "encode" else self.decoder.layers()

    def _run(
        self, direction: str, x: Tensor, strip: int | str | None, columns: int | None, on_strip: OnStrip | None
    ) -> Tensor:
        layers = self.layers(direction)
        h, w = (side // (self.config.spatial_factor if direction == "encode" else 1) for side in x.shape[2:])
        if strip == "auto":
            cache = CPU_WORKING_BYTES if x.device.type == "cpu" else None
            strip, columns = choose_strip(self.config, h, w, self.dtype, free_memory(x.device), direction, cache)
            strip = h if strip is None and x.shape[0] > 1 else strip  # the estimate is for one picture
        check_strip(strip, columns)
        if strip is not None and self.training and any(isinstance(m, nn.BatchNorm2d) for m in self.modules()):
            raise DCAEError("strips need fixed normalisation: call eval() on this DC-AE, or train it with strip=None")
        width = x.shape[3] if columns is None else min(x.shape[3], columns * (x.shape[3] // w))
        limit = budget(layers, width, strip) if strip else whole_budget(layers, x.shape)
        meter = Meter(layers, x.shape, 1 if strip is None else x.shape[0], on_strip)
        pictures = [x] if strip is None else x.split(1)
        if len(pictures) == 1:
            return self._picture(layers, pictures[0], limit, columns, meter, direction)
        done = [self._picture(layers, picture, limit, columns, meter, direction) for picture in pictures]
        return torch.cat(done)

    def _picture(
        self, layers: list[Layer], x: Tensor, limit: int, columns: int | None, meter: Meter, direction: str
    ) -> Tensor:
        if columns is None:
            return run(layers, x, self.dtype, limit, meter)
        factor = self.config.spatial_factor
        cut = local_part(layers, x.shape[3], direction, factor)
        if direction == "decode":
            middle = run(layers[:cut], x, self.dtype, limit, meter) if cut else x
            return run_panels(layers[cut:], middle, self.dtype, limit, columns * middle.shape[3] // x.shape[3], meter)
        middle = run_panels(layers[:cut], x, self.dtype, limit, columns * factor, meter)
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
            f"{latent.shape[1]}: it was made by another autoencoder; decode it with that one"
        )

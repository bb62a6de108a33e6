"""EfficientViT blocks of a DC-AE as streams of image rows: linear attention and the gated convolution.

Linear attention is a sum over all pixels: it is accumulated while the chunks arrive and applied in a second pass, so
only its narrow input is ever held whole.
"""

# B batch, C channels, H W rows and columns at the layer's own resolution, N = H*W tokens, f spatial factor

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FP16_MAX, KEEP_SHARE, Device, Layer, RMSNorm, activate, conv3x3, finite, make_norm, plain, pointwise
from .stream import Chunks, Collector, Handover, Window, drain, in_rows


class Attention(nn.Module, Layer):
    """x + norm(out(multi-scale ReLU linear attention)). Global: reads its input twice, keeps only sums.

    to_q / to_k / to_v hold thirds of one projection whose rows are [q, k, v] per head, as published; they are not the
    queries, keys and values.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        scales: tuple[int, ...],
        norm: str,
        operations: Any,
        dtype: torch.dtype | None,
        device: Device,
    ) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, 1e-15
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        inner = channels // head_dim * head_dim
        self.to_q = operations.Linear(channels, inner, bias=False, **factory_kwargs)
        self.to_k = operations.Linear(channels, inner, bias=False, **factory_kwargs)
        self.to_v = operations.Linear(channels, inner, bias=False, **factory_kwargs)
        self.to_qkv_multiscale: Any = nn.ModuleList(
            AttentionScale(inner, head_dim, size, operations, dtype, device) for size in scales
        )
        self.to_out = operations.Linear(inner * (1 + len(scales)), channels, bias=False, **factory_kwargs)
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
            if keep is None:  # a small image's queries are kept, a large one's would take too much memory
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

        def mixed(queries: list[Tensor]) -> Tensor:
            nonlocal done, whole
            chunk = whole[:, :, done : done + queries[0].shape[2] // whole.shape[3]]
            done += chunk.shape[2]
            if done == height:
                del whole
            return self.mix(sums, queries, chunk)

        yield from Handover(mixed, drain(held) if keep else self.again(whole, rows, height))

    def again(self, whole: Tensor, rows: int, height: int) -> Iterator[list[Tensor]]:
        """The queries of the whole input, a chunk at a time."""
        project = self.projection()

        def queries(rows: tuple[Tensor, bool]) -> list[Tensor] | None:
            pieces = project(*rows)
            return None if pieces is None else [piece[:, :, 0] for piece in pieces]

        return Handover(queries, in_rows(drain(list(whole.split(rows, 2))), height))

    def projection(self) -> Callable[[Tensor, bool], list[Tensor] | None]:
        """A function with fresh row memory: rows -> one (B, heads, 3, N, head_dim) of q, k, v per scale."""
        window = Window(2 * self.margin + 1, 1, self.margin, self.margin)
        thirds = [self.to_q, self.to_k, self.to_v]
        weight: Tensor | None = None

        def project(x: Tensor, last: bool) -> list[Tensor] | None:
            nonlocal weight
            if weight is None and all(map(plain, thirds)):  # not before rows arrive: every layer's would be alive
                weight = torch.cat([layer.weight for layer in thirds])
            tokens = x.movedim(1, -1)
            qkv = torch.cat([layer(tokens) for layer in thirds], -1) if weight is None else F.linear(tokens, weight)
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
        result: Tensor = self.norm_out(y, residual=x)
        return result


class AttentionScale(nn.Module):
    """Depthwise k x k, then 1x1 per third of a head (arXiv:2205.14756, multi-scale tokens)."""

    def __init__(
        self, inner: int, head_dim: int, size: int, operations: Any, dtype: torch.dtype | None, device: Device
    ) -> None:
        super().__init__()
        self.size, self.head_dim = size, head_dim
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        channels = 3 * inner
        self.proj_in = operations.Conv2d(
            channels, channels, size, padding=(0, size // 2), groups=channels, bias=False, **factory_kwargs
        )
        self.proj_out = operations.Conv2d(
            channels, channels, 1, groups=channels // head_dim, bias=False, **factory_kwargs
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3 * inner, H + size - 1, W) -> (B, 3 * heads, H * W, head_dim)."""
        x = finite(self.proj_in(x))
        if not plain(self.proj_out):
            heads: Tensor = finite(self.proj_out(x)).flatten(2).unflatten(1, (-1, self.head_dim))
            return heads.transpose(2, 3)
        weight = self.proj_out.weight.view(-1, self.head_dim, self.head_dim)
        groups = x.movedim(1, -1).flatten(1, 2).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return finite(groups @ weight.transpose(1, 2))


class GLUMBConv(nn.Module, Layer):
    """x + norm(point(u * silu(g))), [u, g] = depth3x3(silu(expand(x))); the hidden width is 2 * 4C."""

    def __init__(self, channels: int, operations: Any, dtype: torch.dtype | None, device: Device) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden = 4 * channels
        self.conv_inverted = operations.Conv2d(channels, 2 * hidden, 1, **factory_kwargs)
        self.conv_depth = conv3x3(operations, 2 * hidden, 2 * hidden, groups=2 * hidden, **factory_kwargs)
        self.conv_point = operations.Conv2d(hidden, channels, 1, bias=False, **factory_kwargs)
        self.norm = RMSNorm(channels, **factory_kwargs)
        self.channels = channels
        self.live, self.work = 22 * channels, sum(weight.numel() for weight in self.parameters())
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
            result: Tensor = self.norm(pointwise(self.conv_point, hidden), residual=residual)
            return result
        # The product of two float16 numbers overflows. The norm forgets the scale of a pixel (up to its eps), so
        # shrink each pixel into range before the projection and let eps know.
        product = value.float() * F.silu(gate.float())
        shrink = (FP16_MAX / 64 / product.abs().amax(1, keepdim=True).clamp(min=1e-6)).clamp(max=1.0)
        y = pointwise(self.conv_point, (product * shrink).to(value.dtype))
        result = self.norm(y, residual=residual, eps=self.norm.eps * shrink.square())
        return result


class EfficientViTBlock(nn.Module):
    """Attention, then the gated convolution; each with its own residual."""

    def __init__(
        self,
        channels: int,
        head_dim: int,
        scales: tuple[int, ...],
        norm: str,
        operations: Any,
        dtype: torch.dtype | None,
        device: Device,
    ) -> None:
        super().__init__()
        self.attn = Attention(channels, head_dim, scales, norm, operations, dtype, device)
        self.conv_out = GLUMBConv(channels, operations, dtype, device)

# B batch, C latent channels, h w latent rows and columns, p patch size, N image tokens, T text tokens, D width, H heads
"""SANA's denoising network (arXiv:2410.10629, 2501.18427, 2503.09641), with diffusers' names for its tensors.

ComfyUI has no SANA, so this is the one denoising network in this package. It equals diffusers' SanaTransformer2DModel
in float32; `operations` supplies the layers (torch.nn or ComfyUI's comfy.ops), factory_kwargs their dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...cpu import onednn_linear

QK_NORM = "rms_norm_across_heads"
SINUSOID = 256
FLOAT16_MAX = 65504.0
# Added to the attention score of a masked text token.
MASKED = -10000.0
# Tokens at a time for the 3x3 convolution and its gate, the memory peak of a block: as many as fit a CPU's cache, or
# keep a GPU busy.
STRIP_CPU, STRIP = 128, 2048


@dataclass(frozen=True)
class SanaConfig:
    """The fields of diffusers' SanaTransformer2DModel config that affect the network; the defaults are SANA-1.6B's."""

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> SanaConfig:
        """Read a config.json; ValueError for values that no published SANA has."""
        names = {field.name for field in fields(cls)}
        parsed = cls(**{key: value for key, value in config.items() if key in names and value is not None})
        width = parsed.width
        expected = {
            "cross_attention_dim": (width, None),
            "norm_elementwise_affine": (False,),
            "qk_norm": (None, QK_NORM),
        }
        unsupported = {key: config[key] for key, good in expected.items() if key in config and config[key] not in good}
        if parsed.num_cross_attention_heads * parsed.cross_attention_head_dim != width:
            unsupported["num_cross_attention_heads"] = parsed.num_cross_attention_heads
        if unsupported:
            raise ValueError(f"SANA of width {width}: unsupported config {unsupported}")
        return parsed

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class SanaNet(nn.Module):
    """SANA. See forward for shapes."""

    def __init__(
        self,
        config: SanaConfig,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        D, p = config.width, config.patch_size
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.patch_embed: Any = nn.Module()
        self.patch_embed.proj = operations.Conv2d(config.in_channels, D, p, stride=p, **factory_kwargs)
        self.time_embed = TimeEmbed(D, config.guidance_embeds, operations, factory_kwargs)
        self.caption_projection = MLP(config.caption_channels, D, operations, factory_kwargs)
        self.caption_norm = operations.RMSNorm(D, eps=1e-5, **factory_kwargs)
        self.transformer_blocks = nn.ModuleList(
            Block(config, operations, factory_kwargs) for _ in range(config.num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.empty(2, D, **factory_kwargs))
        self.proj_out = operations.Linear(D, p * p * config.out_channels, **factory_kwargs)
        self._positions: tuple[Any, Tensor] | None = None

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        caption: Tensor,
        caption_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B,C,h,w) at latents (B,C,h,w).

        timestep (B,): 1000*sigma for SANA, 0..1 for Sprint. caption (B,T,Dc): text features; caption_mask (B,T): 1 for
        a token, 0 for padding. guidance (B,): input of Sprint's guidance embedding (scale times 0.1), else None.
        """
        config = self.config
        if (guidance is None) == config.guidance_embeds:
            needs = "needs" if config.guidance_embeds else "has no embedding for"
            raise ValueError(f"this SANA {needs} guidance")
        with onednn_linear(latents):
            return self._run(latents, timestep, *readable(caption, caption_mask), guidance)

    def _run(
        self, latents: Tensor, timestep: Tensor, caption: Tensor, mask: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        config = self.config
        rows, columns = (side // config.patch_size for side in latents.shape[2:])
        x = self.patch_embed.proj(latents).flatten(2).transpose(1, 2).contiguous()
        if config.interpolation_scale is not None:
            x = self._add_positions(x, rows, columns)
        modulation, time = self.time_embed(timestep, guidance, x.dtype)
        text = self.caption_norm(self.caption_projection(caption))
        bias = None if mask is None else ((1 - mask.to(x.dtype)) * MASKED)[:, None, None]
        for block in self.transformer_blocks:
            x = block(x, text, bias, modulation, rows, columns)
        shift, scale = (_table(self.scale_shift_table, x) + time[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(modulated_norm(x, shift, scale, 1e-6))
        return unpatchify(tokens, rows, columns, config.patch_size)

    def _add_positions(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Add sine-cosine positions: the first half of the width encodes the column, the second half the row."""
        key = (rows, columns, x.device)
        if self._positions is None or self._positions[0] != key:
            table = position_table(rows, columns, self.config)
            self._positions = (key, table.to(x.device))
        x_with_positions: Tensor = x.unflatten(1, (rows, columns)) + self._positions[1]
        return x_with_positions.flatten(1, 2).to(x.dtype)


class Block(nn.Module):
    """Linear self-attention, cross-attention to the text, convolutional GLU; modulated by the timestep."""

    def __init__(self, config: SanaConfig, operations: Any, factory_kwargs: dict[str, Any]) -> None:
        super().__init__()
        D = config.width
        self.eps = config.norm_eps
        self.attn1 = LinearAttention(
            D, config.num_attention_heads, config.attention_bias, config, operations, factory_kwargs
        )
        self.attn2 = CrossAttention(D, config.num_cross_attention_heads, True, config, operations, factory_kwargs)
        self.ff = GLUMBConv(D, int(config.mlp_ratio * D), operations, factory_kwargs)
        self.scale_shift_table = nn.Parameter(torch.empty(6, D, **factory_kwargs))

    def forward(
        self, x: Tensor, text: Tensor, bias: Tensor | None, modulation: Tensor, rows: int, columns: int
    ) -> Tensor:
        """x (B,N,D), text (B,T,D), bias (B,1,1,T), modulation (B,6D) -> (B,N,D)."""
        table = _table(self.scale_shift_table, x) + modulation.unflatten(1, (6, -1))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table.chunk(6, dim=1)
        x = finite(torch.addcmul(x, gate, self.attn1(modulated_norm(x, shift, scale, self.eps))))
        x = finite(x + self.attn2(x, text, bias))
        return finite(torch.addcmul(x, gate_ff, self.ff(x, shift_ff, scale_ff, self.eps, rows, columns)))


class _Attention(nn.Module):
    """The layers that both kinds of attention share."""

    def __init__(
        self, D: int, heads: int, bias: bool, config: SanaConfig, operations: Any, factory_kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (operations.Linear(D, D, bias=bias, **factory_kwargs) for _ in range(3))
        self.to_out = nn.ModuleList([operations.Linear(D, D, **factory_kwargs)])
        normed = config.qk_norm is not None
        self.norm_q = operations.RMSNorm(D, eps=1e-5, **factory_kwargs) if normed else None
        self.norm_k = operations.RMSNorm(D, eps=1e-5, **factory_kwargs) if normed else None

    def qkv(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B,H,N,d), key and value (B,H,T,d)."""
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        # Cross-attention's query is a projection of the un-normalised residual stream and may overflow float16.
        query, key, value = (
            finite(part).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        return query, key, value


class LinearAttention(_Attention):
    """softmax-free attention with ReLU features, O(N): relu(Q) (relu(K)^T V) / relu(Q) sum relu(K)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,D) -> (B,N,D); the sums over tokens are always float32."""
        query, key, value = self.qkv(x, x)
        sums = _sums(relu(key).float(), value.float())
        del key, value  # before the query is cast to float32
        mixed = relu(query).float() @ sums
        mixed = mixed[..., :-1] / (mixed[..., -1:] + 1e-15)
        return finite(self.to_out[0](mixed.transpose(1, 2).flatten(2).to(x.dtype)))


def _sums(key: Tensor, value: Tensor) -> Tensor:
    """sum over tokens of key value^T, and of key in the last column: (B,H,N,d) both -> (B,H,d,d+1)."""
    return torch.cat((key.transpose(2, 3) @ value, key.sum(dim=2)[..., None]), dim=3)


class CrossAttention(_Attention):
    """Softmax attention of image tokens to text tokens."""

    def forward(self, x: Tensor, text: Tensor, bias: Tensor | None) -> Tensor:
        """x (B,N,D), text (B,T,D), bias (B,1,1,T) added to the scores -> (B,N,D)."""
        query, key, value = self.qkv(x, text)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return finite(self.to_out[0](mixed.transpose(1, 2).flatten(2)))


class GLUMBConv(nn.Module):
    """Norm, 1x1 -> SiLU -> depthwise 3x3 -> value * SiLU(gate) -> 1x1; the 3x3 gives SANA its positional information.

    The 1x1 convolutions of the files are Linear layers here: no copies of the tokens, and quantized kernels for Linear
    (fp8, nvfp4) apply.
    """

    def __init__(self, D: int, hidden: int, operations: Any, factory_kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.conv_inverted = operations.Linear(D, 2 * hidden, **factory_kwargs)
        self.conv_depth = operations.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, **factory_kwargs)
        self.conv_point = operations.Linear(hidden, D, bias=False, **factory_kwargs)
        self.register_load_state_dict_pre_hook(_as_linear)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, rows: int, columns: int) -> Tensor:
        """x (B, rows*columns, D), normalised with shift and scale (B,1,D) -> (B, rows*columns, D)."""
        wide = silu(finite(self.conv_inverted(modulated_norm(x, shift, scale, eps)))).unflatten(1, (rows, columns))
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            gated = torch.mul(*self._convolved(wide, 0, rows))
        else:
            gated = self._gated(wide)
        del wide  # before the next large tensor is allocated
        return finite(self.conv_point(finite(gated.flatten(1, 2))))

    def _gated(self, x: Tensor) -> Tensor:
        """3x3 and gate, (B, rows, columns, 2*hidden) -> (B, rows, columns, hidden), some rows at a time."""
        rows, columns, width = x.shape[1:]
        step = max(1, (STRIP_CPU if x.device.type == "cpu" else STRIP) // columns)
        if step >= rows:
            value, gate = self._convolved(x, 0, rows)
            return value.mul_(gate)
        out = x.new_empty(*x.shape[:3], width // 2)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            torch.mul(*self._convolved(x, start, stop), out=out[:, start:stop])
        return out

    def _convolved(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Value and SiLU(gate) of the rows start..stop, with the neighbouring rows as context."""
        above, below = max(0, start - 1), min(x.shape[1], stop + 1)
        convolved = finite(self.conv_depth(x[:, above:below].permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        value, gate = convolved[:, start - above : stop - above].chunk(2, dim=3)
        return value, silu(gate)


def _as_linear(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """(out,in,1,1) weights of the files -> (out,in), before loading."""
    for name in ("conv_inverted", "conv_point"):
        weight = state_dict.get(f"{prefix}{name}.weight")
        if isinstance(weight, Tensor) and weight.ndim == 4:
            state_dict[f"{prefix}{name}.weight"] = weight.flatten(1)


class TimeEmbed(nn.Module):
    """AdaLN-single: one vector for the timestep (and Sprint's guidance), and the modulation of all blocks from it."""

    def __init__(self, D: int, guided: bool, operations: Any, factory_kwargs: dict[str, Any]) -> None:
        super().__init__()
        if guided:
            self.timestep_embedder = MLP(SINUSOID, D, operations, factory_kwargs, silu)
            self.guidance_embedder = MLP(SINUSOID, D, operations, factory_kwargs, silu)
        else:
            self.emb: Any = nn.Module()
            self.emb.timestep_embedder = MLP(SINUSOID, D, operations, factory_kwargs, silu)
        self.linear = operations.Linear(D, 6 * D, **factory_kwargs)

    def forward(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """timestep (B,), guidance (B,) or None -> modulation (B,6D), time (B,D)."""
        if guidance is None:
            time = self.emb.timestep_embedder(sinusoid(timestep).to(dtype))
        else:
            time = self.timestep_embedder(sinusoid(timestep).to(dtype))
            time = time + self.guidance_embedder(sinusoid(guidance).to(dtype))
        return self.linear(F.silu(time)), time


class MLP(nn.Module):
    """Linear, activation (GELU tanh unless given), Linear."""

    def __init__(
        self, inputs: int, D: int, operations: Any, factory_kwargs: dict[str, Any], activation: Any = None
    ) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(inputs, D, **factory_kwargs)
        self.linear_2 = operations.Linear(D, D, **factory_kwargs)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear_1(x)
        hidden = F.gelu(hidden, approximate="tanh") if self._activation is None else self._activation(hidden)
        out: Tensor = self.linear_2(hidden)
        return out


def readable(caption: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Caption (B,T,Dc) and mask (B,T) without the positions that are padding in the whole batch.

    Exact: padding has zero attention weight in float32 and in 16 bits. The mask is None when no padding is left. When a
    row is all padding, attention to it is uniform, so nothing is removed; nor under torch.compile, to keep one shape.
    """
    if mask is None or mask.device.type == "meta" or torch.compiler.is_compiling():
        return caption, mask
    tokens = (mask != 0).cpu()
    if not tokens.any(dim=1).all():
        return caption, mask
    used = tokens.any(dim=0).nonzero()[:, 0]
    if len(used) < tokens.shape[1]:
        caption, mask = (part.index_select(1, used.to(part.device)) for part in (caption, mask))
    return caption, None if tokens[:, used].all() else mask


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm of x (B,N,D) over D, times (1 + scale), plus shift, both (B,1,D)."""
    if len(x) == 1:  # the modulation is then weight and bias of the norm, in one kernel
        return finite(F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), eps))
    return finite(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale))


def unpatchify(tokens: Tensor, rows: int, columns: int, p: int) -> Tensor:
    """(B, rows*columns, p*p*C), channels last within a patch -> (B, C, rows*p, columns*p)."""
    tokens = tokens.reshape(tokens.shape[0], rows, columns, p, p, -1)
    return tokens.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, rows * p, columns * p)


def sinusoid(value: Tensor) -> Tensor:
    """(B,) -> (B,256) float32: cosines, then sines, of 128 frequencies from 1 to 1/10000."""
    half = SINUSOID // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=value.device, dtype=torch.float32) / half)
    angles = value.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def position_table(rows: int, columns: int, config: SanaConfig) -> Tensor:
    """(rows, columns, D) float32. Any grid spans sample_size/patch_size/interpolation_scale steps, as in training."""
    base = config.sample_size // config.patch_size
    scale = float(config.interpolation_scale or 1.0)
    quarter = config.width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def along(count: int) -> Tensor:
        position = torch.arange(count, dtype=torch.float32) / (count / base) / scale
        angles = position.double()[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()

    column, row = along(columns), along(rows)
    return torch.cat((column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)), dim=-1)


def silu(x: Tensor) -> Tensor:
    """SiLU, in place when gradients are disabled."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def relu(x: Tensor) -> Tensor:
    """ReLU, in place when gradients are disabled."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


def finite(x: Tensor) -> Tensor:
    """Clamp float16 to its finite range; diffusers does so after the linear attention only.

    For temporary tensors: in place when gradients are disabled.
    """
    if x.dtype != torch.float16:
        return x
    clamp = torch.clamp if torch.is_grad_enabled() else torch.clamp_
    return clamp(x, -FLOAT16_MAX, FLOAT16_MAX)


def _table(table: Tensor, x: Tensor) -> Tensor:
    """A modulation table (k,D) on the device and in the dtype of x; offloading may have left it elsewhere."""
    return table.to(device=x.device, dtype=x.dtype)[None]

# B batch, C latent channels, h w latent rows and columns, N tokens, T text tokens, D width
"""Pebble in training: a small joint transformer with diffusers names, whose text has as many tokens as words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from dcgen.backbones import BACKBONES, Config
from train.conditioning import CondField, Role
from train.family import Family, TinyRelease, child
from train.tiny import tiny_kl

TEXT_DIM = 12


class Attention(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(D, D) for _ in range(4))


class Block(nn.Module):
    def __init__(self, D: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attn = heads, Attention(D)
        self.ff = nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        parts = (self.attn.to_q(normed), self.attn.to_k(normed), self.attn.to_v(normed))
        q, k, v = (rearrange(part, "B N (H d) -> B H N d", H=self.heads) for part in parts)
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        x = x + self.attn.to_out(rearrange(mixed, "B H N d -> B N (H d)"))
        return x + self.ff(F.layer_norm(x, x.shape[-1:]))


class TimeEmbed(nn.Module):
    def __init__(self, D: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(64, D), nn.Linear(D, D)

    def forward(self, step: Tensor) -> Tensor:
        rates = torch.tensor([1000 ** (-i / 32) for i in range(32)], device=step.device)
        angles = step[:, None] * rates
        return self.linear_2(
            F.silu(self.linear_1(torch.cat([angles.cos(), angles.sin()], -1).to(self.linear_1.weight)))
        )


class PebbleTransformer2DModel(ModelMixin, ConfigMixin):
    """forward(latents (B,C,h,w), 1000 sigma (B,), text (B,T,Dt), mask (B,T)) -> velocity (B,C,h,w)."""

    @register_to_config
    def __init__(
        self, in_channels: int, patch_size: int, num_layers: int, num_attention_heads: int, attention_head_dim: int,
        text_dim: int,
    ) -> None:  # fmt: skip
        super().__init__()
        D, packed = num_attention_heads * attention_head_dim, in_channels * patch_size**2
        self.x_embedders = nn.ModuleDict({f"p{patch_size}": nn.Linear(packed, D)})
        self.proj_outs = nn.ModuleDict({f"p{patch_size}": nn.Linear(D, packed)})
        self.context_embedder = nn.Linear(text_dim, D)
        self.time_embed = TimeEmbed(D)
        self.transformer_blocks = nn.ModuleList(Block(D, num_attention_heads) for _ in range(num_layers))

    def forward(self, latents: Tensor, step: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        p = self.config.patch_size
        image = self.x_embedders[f"p{p}"](rearrange(latents, "B C (h a) (w b) -> B (h w) (C a b)", a=p, b=p))
        tokens = torch.cat([image, self.context_embedder(text)], 1) + self.time_embed(step)[:, None]
        seen = torch.cat([torch.ones_like(image[..., 0]), mask.to(image)], 1).bool()[:, None, None]
        for block in self.transformer_blocks:
            tokens = block(tokens, seen)
        out = self.proj_outs[f"p{p}"](F.layer_norm(tokens[:, : image.shape[1]], tokens.shape[-1:]))
        return rearrange(out, "B (h w) (C a b) -> B C (h a) (w b)", h=latents.shape[2] // p, a=p, b=p)


class Words:
    """A vector for each word, made from its letters."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = device

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        rows = [[self.vector(word) for word in caption.split()] for caption in captions]
        longest = max(1, *map(len, rows))
        text, mask = torch.zeros(len(rows), longest, TEXT_DIM), torch.zeros(len(rows), longest)
        for i, row in enumerate(rows):
            if row:
                text[i, : len(row)], mask[i, : len(row)] = torch.stack(row), 1
        return {"text": text.to(self.device), "mask": mask.to(self.device)}

    @staticmethod
    def vector(word: str) -> Tensor:
        return torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(sum(word.encode())))


class Pebble(Family):
    backbone = BACKBONES["pebble"]
    lora_targets = (r"transformer_blocks\.\d+\.(attn\.to_(q|k|v|out)|ff\.[02])",)
    fields: ClassVar[dict[str, CondField]] = {"text": CondField(Role.TEXT, ragged=True), "mask": CondField(Role.MASK)}

    def network_class(self) -> Any:
        return PebbleTransformer2DModel

    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        p = config["patch_size"]
        return child(model, f"x_embedders.p{p}")(rearrange(latents, "B C (h a) (w b) -> B h w (C a b)", a=p, b=p))

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        return model(latents, 1000 * sigma, cond["text"], cond["mask"])

    def image_tokens(self, output: Any, grid: tuple[int, int]) -> Tensor:
        """The image comes first here."""
        return output[:, : grid[0] * grid[1]].unflatten(1, grid)

    def text_encoder(
        self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
    ) -> Callable[[Sequence[str]], dict[str, Tensor]]:
        return Words(device)

    def tiny(self, guidance_embeds: bool) -> TinyRelease:
        config = {"in_channels": 4, "patch_size": 2, "num_layers": 2, "num_attention_heads": 2}
        return TinyRelease(
            pipeline="PebblePipeline",
            config={**config, "attention_head_dim": 16, "text_dim": TEXT_DIM},
            autoencoder=tiny_kl,
            scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}),
        )


FAMILY = Pebble()

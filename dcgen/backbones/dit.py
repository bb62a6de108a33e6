# B batch, C latent channels, h w latent rows and columns, p patch size, D width, t DDPM step
"""DiT-XL/2 (class-conditional): diffusers DiTTransformer2DModel and the original facebookresearch names.

DiT predicts noise along the DDPM path sqrt(abar)*x0 + sqrt(1-abar)*noise. A flow's x_sigma is the same point up to
its length, so velocity() finds the step with the same ratio of signal and noise and turns the noise into a velocity.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..fields import Check, whole
from ..latent import LatentSpace
from .base import FIELDS, Backbone, Config, child, model_config
from .keymap import KeyMap, Row

STEPS = 1000
BETAS = (1e-4, 0.02)  # linear
HEAD_DIM = 72
_BLOCK, _NATIVE = "transformer_blocks.{i}", "blocks.{i}"


def _row(native: str, *parts: str) -> Row:
    return Row(f"{_NATIVE}.{native}", tuple(f"{_BLOCK}.{part}" for part in parts))


KEYS = KeyMap(
    model="DiT",
    top=(
        Row("x_embedder.proj", ("pos_embed.proj",)),
        Row("final_layer.adaLN_modulation.1", ("proj_out_1",)),
        Row("final_layer.linear", ("proj_out_2",)),
    ),
    blocks={
        "block": (
            _row("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
            _row("attn.proj", "attn1.to_out.0"),
            _row("mlp.fc1", "ff.net.0.proj"),
            _row("mlp.fc2", "ff.net.2"),
            _row("adaLN_modulation.1", "norm1.linear"),
            # diffusers gives every block its own copy of the time and class embedders.
            Row("t_embedder.mlp.0", (f"{_BLOCK}.norm1.emb.timestep_embedder.linear_1",), copied=True),
            Row("t_embedder.mlp.2", (f"{_BLOCK}.norm1.emb.timestep_embedder.linear_2",), copied=True),
            Row(
                "y_embedder.embedding_table",
                (f"{_BLOCK}.norm1.emb.class_embedder.embedding_table",),
                suffixes=(".weight",),
                copied=True,
            ),
        )
    },
    dropped=("pos_embed",),  # fixed sine-cosine positions, made anew for any grid
)


class DiT(Backbone):
    """DiT. cond: labels (B,) int64, num_embeds_ada_norm (1000) for none; guidance is not for this model."""

    name = "dit"
    diffusers_class = "DiTTransformer2DModel"
    modelspec = "dit"
    embedder = "pos_embed.proj"
    head = "proj_out_2"
    native_embedder = "x_embedder.proj"
    native_head = "final_layer.linear"
    keys = KEYS
    lora_targets = (r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",)
    signatures = (
        ("pos_embed.proj.weight", "proj_out_2.weight"),
        ("x_embedder.proj.weight", "y_embedder.embedding_table.weight"),
    )
    probes: ClassVar[dict[str, tuple[str, str, int]]] = {
        "width": ("pos_embed.proj.weight", "x_embedder.proj.weight", 0),
        "in_channels": ("pos_embed.proj.weight", "x_embedder.proj.weight", 1),
        "patch_size": ("pos_embed.proj.weight", "x_embedder.proj.weight", 2),
        "out_channels": ("proj_out_2.weight", "final_layer.linear.weight", 0),
        "num_embeds_ada_norm": (
            "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
            "y_embedder.embedding_table.weight",
            0,
        ),
    }
    stacks: ClassVar[dict[str, tuple[str, str, str]]] = {"block": ("num_layers", "transformer_blocks", "blocks")}
    fingerprint_fields = ("num_layers", "num_attention_heads", "num_embeds_ada_norm")
    told_fields = ("learned_sigma",)
    fields: ClassVar[dict[str, Check]] = {**FIELDS, "num_embeds_ada_norm": whole(0, 1 << 20)}
    needed_fields = ("in_channels", "attention_head_dim", "patch_size", "sample_size", *fingerprint_fields)

    def config_with_latent(self, config: Config, channels: int, patch_size: int = 1) -> Config:
        """The head keeps predicting a variance if it did. sample_size, which positions refer to, keeps its tokens."""
        size = config["sample_size"] // config["patch_size"] * patch_size
        outputs = channels * (2 if _learned_sigma(config) else 1)
        return {
            **config,
            "in_channels": channels,
            "out_channels": outputs,
            "patch_size": patch_size,
            "sample_size": size,
        }

    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        """With positions, as the released recipe compares them."""
        p = config["patch_size"]
        return child(model, "pos_embed")(latents).unflatten(1, (latents.shape[2] // p, latents.shape[3] // p))

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """noise - x0 by way of the noise; sigma is held within what DDPM's steps reach (0.0099 to 0.9937)."""
        levels = flow_sigmas().to(sigma.device)
        held = sigma.float().clamp(levels[0], levels[-1])
        step = _interpolate(held, levels)
        level = held[:, None, None, None].to(latents.dtype)
        length = ((1 - level).square() + level.square()).sqrt()
        noise = self.predict_noise(model, latents / length, step, cond)
        return (noise - latents) / (1 - level)

    def predict_noise(self, model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Noise (B,C,h,w) in DDPM latents sqrt(abar)*x0 + sqrt(1-abar)*noise at step (B,) in 0..999."""
        config = model_config(model)
        if latents.shape[1] != config["in_channels"] or latents.shape[2] != latents.shape[3]:
            raise ValueError(
                f"this DiT takes square latents of {config['in_channels']} channels, got {tuple(latents.shape[1:])}"
            )
        found = model(latents, timestep=timestep, class_labels=cond["labels"], return_dict=False)[0]
        return found[:, : latents.shape[1]]  # a learned variance follows the noise

    def fingerprint(self, config: Config) -> dict[str, Any]:
        return {**super().fingerprint(config), "learned_sigma": _learned_sigma(config)}

    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        width = base["width"]
        return {"proj_out_1.weight": (2 * width, width), "proj_out_1.bias": (2 * width,)}

    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D = base["width"]
        block = {
            "norm1.linear": (6 * D, D),
            "norm1.emb.timestep_embedder.linear_1": (D, 256),
            "norm1.emb.timestep_embedder.linear_2": (D, D),
            **{f"attn1.{name}": (D, D) for name in ("to_q", "to_k", "to_v", "to_out.0")},
            "ff.net.0.proj": (4 * D, D),
            "ff.net.2": (D, 4 * D),
        }
        return {"": {"proj_out_1": (2 * D, D)}, "block": block}

    def others(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        table = (config["num_embeds_ada_norm"] + 1, self.width(config))  # the last row is for no class
        return {"block": {"norm1.emb.class_embedder.embedding_table.weight": table}}

    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        """Heads are in no tensor: 72 wide as in DiT-XL, else 64. So is the size: that of 256 px at f8 is taken."""
        found = self.read(self.bare_keys(state_dict))
        width, p = found.pop("width"), found["patch_size"]
        head_dim = HEAD_DIM if width % HEAD_DIM == 0 else 64
        if width % head_dim:
            raise ValueError(f"DiT width {width} is a multiple of neither 72 nor 64")
        return {
            **found,
            "out_channels": found["out_channels"] // p**2,
            "num_embeds_ada_norm": found["num_embeds_ada_norm"] - 1,  # the last row is for no class
            "num_attention_heads": width // head_dim,
            "attention_head_dim": head_dim,
            "sample_size": 16 * p,
        }

    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> dict[str, Any]:
        """DiT was trained on all steps alike: no shift."""
        return {"rule": "static", "shift": 1.0}


@lru_cache(maxsize=1)
def alphas_cumprod() -> Tensor:
    """abar of DDPM's steps 0..999, (1000,) float64: linear betas."""
    return (1 - torch.linspace(*BETAS, STEPS, dtype=torch.float64)).cumprod(0)


@lru_cache(maxsize=1)
def flow_sigmas() -> Tensor:
    """sigma of DDPM's steps 0..999, (1000,) float32, rising: the flow point with the same ratio of signal and noise."""
    signal, noise = alphas_cumprod().sqrt(), (1 - alphas_cumprod()).sqrt()
    return (noise / (signal + noise)).float()


def _interpolate(sigma: Tensor, levels: Tensor) -> Tensor:
    """Fractional DDPM step (B,) of sigma (B,) within levels (1000,) rising: linear between two steps."""
    above = torch.searchsorted(levels, sigma).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return above - 1 + (sigma - low) / (high - low)


def _learned_sigma(config: Mapping[str, Any]) -> bool:
    outputs = config.get("out_channels") or config["in_channels"]
    return outputs == 2 * config["in_channels"]

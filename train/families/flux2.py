# B batch, C latent channels, h w latent rows and columns, p patch size, N image tokens, T text tokens, D width
"""FLUX.2 klein: how the network is called and trained, Qwen3 as its pipeline has it, and a tiny release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from dcgen.backbones import BACKBONES, Config
from dcgen.backbones.base import patch_size
from dcgen.backbones.flux2 import PROMPT, TEXT_LAYERS, TEXT_TOKENS
from train.conditioning import Cond, CondField, Role
from train.family import Architecture, Family, TextEncoder, TinyRelease, child, model_config
from train.text_parts import ANY_TOKENIZER, load_part
from train.tiny import END, tiny_packed_kl, tiny_text

# klein 4B and 9B, from their config.json.
_4B: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "guidance_embeds": False,
    "axes_dims_rope": (32, 32, 32, 32),
}
_9B: dict[str, Any] = {
    **_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
_LATENT = "flux2-f16c128"


class Flux2(Family):
    """FLUX.2. cond: prompt_embeds (B,T,Dt); guidance is g in plain units, for dev: klein has no embedding for it."""

    backbone = BACKBONES["flux2"]
    # Attention and MLP of every block, as published trainers have them; no modulation.
    lora_targets = (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)",
        r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    )
    fields: ClassVar[dict[str, CondField]] = {
        "prompt_embeds": CondField(Role.TEXT),  # padded, without a mask for the network, as Flux2KleinPipeline has it
    }
    token_layers: ClassVar[dict[str, str]] = {
        "text": r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\..+)",
        "joint": r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
        "sample": r"time_guidance_embed\..+|norm_out\.linear|(double|single)_stream_modulation(_img|_txt)?\.linear",
    }
    architectures: ClassVar[dict[str, Architecture]] = {
        "flux.2-klein-4b": Architecture(_4B, _LATENT, 1, (TEXT_TOKENS, 7680)),
        "flux.2-klein-9b": Architecture(_9B, _LATENT, 1, (TEXT_TOKENS, 12288)),
        "dc-gen-klein-4b-f32": Architecture({**_4B, "in_channels": 32}, "dc-ae-f32c32-in-1.0", 1, (TEXT_TOKENS, 7680)),
        "dc-gen-klein-4b-f64": Architecture(_4B, "dc-ae-1.5-f64c128", 1, (TEXT_TOKENS, 7680)),
    }
    text_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", *ANY_TOKENIZER),
        "text_encoder": ("Qwen3ForCausalLM", "Qwen3Model"),
    }

    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        p = patch_size(self._packed_channels(model, config), latents.shape[1], "This FLUX.2")
        embedder = child(model, self.backbone.ends(config).embedder)
        return rearrange(embedder(tokens_of(latents, p)), "B (h w) D -> B h w D", h=latents.shape[2] // p)

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' Flux2KleinPipeline calls it; guidance is ignored by a model that has no embedding for it."""
        takes_guidance = model_config(model)["guidance_embeds"]
        if takes_guidance and guidance is None:
            raise ValueError("this FLUX.2 has a guidance embedding: pass guidance (B,), the scale g")
        p = patch_size(self._packed_channels(model), latents.shape[1], "This FLUX.2")
        rows, columns = latents.shape[2] // p, latents.shape[3] // p
        out = model(
            hidden_states=tokens_of(latents, p),
            timestep=sigma,  # diffusers multiplies by 1000 inside
            guidance=guidance if takes_guidance else None,
            encoder_hidden_states=cond["prompt_embeds"],
            txt_ids=position_ids(1, 1, cond["prompt_embeds"].shape[1], latents.device),
            img_ids=position_ids(rows, columns, 1, latents.device),
            return_dict=False,
        )[0]
        return rearrange(out, "B (h w) (C ph pw) -> B C (h ph) (w pw)", h=rows, ph=p, pw=p)

    def attention_flops(self, config: Mapping[str, Any], image: int, text: int) -> float:
        """Image and text look at each other in blocks of both kinds."""
        blocks = config["num_layers"] + config["num_single_layers"]
        return 4.0 * blocks * config["num_attention_heads"] * config["attention_head_dim"] * (image + text) ** 2

    def text_encoder(
        self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
    ) -> TextEncoder:
        return Qwen3Text(base, device, dtype, tokens)

    def tiny(self, guidance_embeds: bool) -> TinyRelease:
        """2 x 16-wide heads, one block of each kind, on an f4 VAE packed to f8; no guidance embedding."""
        sizes = {"hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
        ends = {"pad_token_id": 0, "eos_token_id": END, "bos_token_id": None}
        qwen = {**sizes, **ends, "head_dim": 8, "num_hidden_layers": max(TEXT_LAYERS) + 1}
        return TinyRelease(
            "Flux2KleinPipeline",
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 12 * len(TEXT_LAYERS),
                "guidance_embeds": False,
                "axes_dims_rope": (4, 4, 4, 4),
            },
            tiny_packed_kl,
            ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
            {"Qwen3ForCausalLM": tiny_text("Qwen3ForCausalLM", "Qwen3Config", **qwen)},
            {"is_distilled": True},
        )

    def _packed_channels(self, model: nn.Module, config: Config | None = None) -> int:
        """Values per token: what the embedder says, which training may have replaced, before what the config says."""
        config = config or model_config(model)
        embedder = child(model, self.backbone.ends(config).embedder)
        return getattr(embedder, "in_features", None) or config["in_channels"]


class Qwen3Text:
    """Three hidden states of Qwen3 side by side, as Flux2KleinPipeline has them: in its chat format, padded."""

    def __init__(self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None) -> None:
        parts = Flux2.text_parts
        self.tokenizer = load_part(base, "tokenizer", parts["tokenizer"])
        self.encoder = load_part(base, "text_encoder", parts["text_encoder"], dtype).to(device)
        self.device = device
        self.tokens = tokens or min(self.tokenizer.model_max_length, TEXT_TOKENS)
        layers = self.encoder.config.num_hidden_layers
        if layers < max(TEXT_LAYERS):
            raise ValueError(f"{base / 'text_encoder'}: {layers} layers, and FLUX.2 reads layer {max(TEXT_LAYERS)}")

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Cond:
        """prompt_embeds (B,T,3D), float32."""
        texts = [PROMPT.format(caption) for caption in captions]
        batch = self.tokenizer(
            texts, padding="max_length", max_length=self.tokens, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        out = self.encoder(
            input_ids=batch.input_ids.to(self.device),
            attention_mask=batch.attention_mask.to(self.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return {"prompt_embeds": torch.cat([out.hidden_states[layer].float() for layer in TEXT_LAYERS], dim=-1)}


def tokens_of(latents: Tensor, p: int) -> Tensor:
    """(B,C,h,w) -> tokens (B, h/p * w/p, C*p*p), channel-major within a patch."""
    if latents.shape[2] % p or latents.shape[3] % p:
        raise ValueError(f"latent of {tuple(latents.shape[2:])} rows and columns does not divide into {p}x{p} patches")
    return rearrange(latents, "B C (h ph) (w pw) -> B (h w) (C ph pw)", ph=p, pw=p)


def position_ids(rows: int, columns: int, places: int, device: torch.device | str | None = None) -> Tensor:
    """RoPE ids (rows*columns*places, 4) = (0, row, column, place): images have one place, texts one row and column."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, rows, columns, places))).float()


FAMILY = Flux2()

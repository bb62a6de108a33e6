# B batch, C latent channels, h w latent rows and columns, p patch size, N image tokens, T text tokens, D width
"""FLUX.1: how the network is called and trained, CLIP and T5 as its pipeline has them, tiny and toy releases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from dcgen.backbones import BACKBONES, Config
from dcgen.backbones.base import patch_size
from train.conditioning import Cond, CondField, Role
from train.family import Architecture, Family, TextEncoder, TinyRelease, child, model_config
from train.text_parts import ANY_TOKENIZER, load_part
from train.tiny import END, tiny_kl, tiny_text
from train.toy.releases import CLIP, T5, ToyText

_CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
# The T5 length and width of the published pipelines.
_TEXT = (512, 4096)


class Flux(Family):
    """FLUX.1. cond: prompt_embeds (B,T,Dt) and pooled (B,Dp); guidance is g = 1 + w in plain units."""

    backbone = BACKBONES["flux"]
    # The layers of the official recipe: attention and MLP of every block, no modulation, not the top-level proj_out.
    lora_targets = (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
    )
    fields: ClassVar[dict[str, CondField]] = {
        "prompt_embeds": CondField(Role.TEXT),  # padded, without a mask, as FluxPipeline has it
        "pooled": CondField(Role.POOLED),
    }
    token_layers: ClassVar[dict[str, str]] = {
        "text": r"context_embedder|transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\..+)",
        "joint": r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)",
        "sample": r"time_text_embed\..+|norm_out\.linear|(single_)?transformer_blocks\.\d+\.norm1?(_context)?\.linear",
    }
    architectures: ClassVar[dict[str, Architecture]] = {
        "flux.1": Architecture(_CONFIG, "flux-f8c16", 2, _TEXT),
        "dc-gen-flux-f32": Architecture({**_CONFIG, "in_channels": 32}, "dc-ae-f32c32-in-1.0", 1, _TEXT),
        "dc-gen-flux-f64": Architecture({**_CONFIG, "in_channels": 128}, "dc-ae-1.5-f64c128", 1, _TEXT),
    }
    text_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast", *ANY_TOKENIZER),
        "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast", *ANY_TOKENIZER),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    }
    toy_text = ToyText(
        "FluxPipeline",
        (CLIP, T5),
        text_widths=("joint_attention_dim", "pooled_projection_dim"),
        scheduler="FlowMatchEulerDiscreteScheduler",
        settings=lambda flow_shift: {
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    )

    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        p = patch_size(self._packed_channels(model, config), latents.shape[1], "This FLUX")
        embedder = child(model, self.backbone.ends(config).embedder)
        return rearrange(embedder(pack(latents, p)), "B (h w) D -> B h w D", h=latents.shape[2] // p)

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' FluxPipeline calls it; guidance is ignored by a model that has no embedding for it."""
        takes_guidance = model_config(model)["guidance_embeds"]
        if takes_guidance and guidance is None:
            raise ValueError("this FLUX has a guidance embedding: pass guidance (B,), the scale g = 1 + w")
        p = patch_size(self._packed_channels(model), latents.shape[1], "This FLUX")
        rows, columns = latents.shape[2] // p, latents.shape[3] // p
        times = (sigma, guidance) if takes_guidance and guidance is not None else (sigma,)
        with _exact_times(child(model, "time_text_embed"), times):
            tokens = model(
                hidden_states=pack(latents, p),
                timestep=sigma,  # diffusers multiplies by 1000 inside
                guidance=guidance if takes_guidance else None,
                pooled_projections=cond["pooled"],
                encoder_hidden_states=cond["prompt_embeds"],
                txt_ids=torch.zeros(cond["prompt_embeds"].shape[1], 3, device=latents.device),
                img_ids=position_ids(rows, columns, latents.device),
                return_dict=False,
            )[0]
        return unpack(tokens, rows, columns, p)

    def attention_flops(self, config: Mapping[str, Any], image: int, text: int) -> float:
        """Image and text look at each other in blocks of both kinds."""
        blocks = config["num_layers"] + config["num_single_layers"]
        return 4.0 * blocks * config["num_attention_heads"] * config["attention_head_dim"] * (image + text) ** 2

    def text_encoder(
        self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
    ) -> TextEncoder:
        return FluxText(base, device, dtype, tokens)

    def tiny(self, guidance_embeds: bool) -> TinyRelease:
        """2 x 16-wide heads, one block of each kind, on an f4 VAE."""
        clip = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16}
        t5 = {"d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        return TinyRelease(
            "FluxPipeline",
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 24,
                "pooled_projection_dim": 16,
                "guidance_embeds": guidance_embeds,
                "axes_dims_rope": (4, 6, 6),
            },
            tiny_kl,
            ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
            {
                "CLIPTextModel": tiny_text(
                    "CLIPTextModel", "CLIPTextConfig", **clip, eos_token_id=END, bos_token_id=END
                ),
                "T5EncoderModel": tiny_text("T5EncoderModel", "T5Config", **t5, feed_forward_proj="gated-gelu"),
            },
        )

    def _packed_channels(self, model: nn.Module, config: Config | None = None) -> int:
        """Values per token: what the embedder says, which training may have replaced, before what the config says."""
        config = config or model_config(model)
        embedder = child(model, self.backbone.ends(config).embedder)
        return getattr(embedder, "in_features", None) or config["in_channels"]


class FluxText:
    """CLIP's pooled output and T5's hidden states, as FluxPipeline has them (T5 padded, without a mask)."""

    def __init__(self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None) -> None:
        parts = Flux.text_parts
        self.clip_tokenizer = load_part(base, "tokenizer", parts["tokenizer"])
        self.t5_tokenizer = load_part(base, "tokenizer_2", parts["tokenizer_2"])
        self.clip = load_part(base, "text_encoder", parts["text_encoder"], dtype).to(device)
        self.t5 = load_part(base, "text_encoder_2", parts["text_encoder_2"], dtype).to(device)
        self.device = device
        self.tokens = tokens or min(self.t5_tokenizer.model_max_length, 512)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Cond:
        """prompt_embeds (B,T,D) and pooled (B,D'), float32."""
        pooled = self.clip(self._ids(self.clip_tokenizer, captions, self.clip_tokenizer.model_max_length))
        hidden = self.t5(self._ids(self.t5_tokenizer, captions, self.tokens))
        return {"prompt_embeds": hidden[0].float(), "pooled": pooled.pooler_output.float()}

    def _ids(self, tokenizer: Any, captions: Sequence[str], length: int) -> Tensor:
        batch = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids.to(self.device)


@contextlib.contextmanager
def _exact_times(embedder: nn.Module, times: Sequence[Tensor]) -> Iterator[None]:
    """Give the embedder 1000 * each of the times (B,) in float32 for the calls inside.

    diffusers casts them to the type of the hidden states first: bfloat16 moves sigma 0.985 to 0.984 and then 984.4 to
    984, up to 4 periods of the fastest sine. ComfyUI, where the model is to run, embeds float32.
    """
    exact = tuple(1000 * time.float() for time in times)
    handle = embedder.register_forward_pre_hook(lambda _, inputs: (*exact, inputs[-1]))
    try:
        yield
    finally:
        handle.remove()


def pack(latents: Tensor, p: int) -> Tensor:
    """(B,C,h,w) -> tokens (B, h/p * w/p, C*p*p), channel-major within a patch as FluxPipeline packs."""
    if latents.shape[2] % p or latents.shape[3] % p:
        raise ValueError(f"latent of {tuple(latents.shape[2:])} rows and columns does not divide into {p}x{p} patches")
    return rearrange(latents, "B C (h ph) (w pw) -> B (h w) (C ph pw)", ph=p, pw=p)


def unpack(tokens: Tensor, rows: int, columns: int, p: int) -> Tensor:
    """Inverse of pack: tokens (B, rows*columns, C*p*p) -> (B,C,rows*p,columns*p)."""
    return rearrange(tokens, "B (h w) (C ph pw) -> B C (h ph) (w pw)", h=rows, w=columns, ph=p, pw=p)


def position_ids(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """RoPE ids (rows*columns, 3) = (0, row, column), float32: one step per token whatever the latent's depth."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((torch.zeros_like(row), row, column), dim=-1).reshape(-1, 3).float().to(device)


FAMILY = Flux()

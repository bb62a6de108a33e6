# B batch, C latent channels, h w latent rows and columns, p patch size, T text tokens, D width
"""SANA: how the network is called and trained, Gemma as its pipeline has it, tiny and toy releases."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dcgen.backbones import BACKBONES, Config
from dcgen.backbones.sana import network_timestep
from train.conditioning import Cond, CondField, Role
from train.family import Architecture, Family, TextEncoder, TinyRelease, child, model_config
from train.text_parts import ANY_TOKENIZER, load_part
from train.tiny import END, tiny_dcae, tiny_text
from train.toy.releases import ToyText, gemma

_CONFIG: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
    "qk_norm": "rms_norm_across_heads",
}
_LATENT, _TEXT = "dc-ae-f32c32-sana-1.0", (300, 2304)


def sana_instruction() -> list[str]:
    """The lines that SANA reads in front of every prompt; the prompt follows the last without a break."""
    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(Family):
    """SANA. cond: prompt_embeds (B,T,Dc) and mask (B,T), 1 for a token; guidance only for Sprint, in plain units."""

    backbone = BACKBONES["sana"]
    # Attention and the 1x1 convolutions of the feed-forward, which hold 98% of a block's weights.
    lora_targets = (
        r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)",
        r"transformer_blocks\.\d+\.ff\.conv_(inverted|point)",
    )
    fields: ClassVar[dict[str, CondField]] = {
        "prompt_embeds": CondField(Role.TEXT),
        "mask": CondField(Role.MASK),
    }
    token_layers: ClassVar[dict[str, str]] = {
        "text": r"caption_projection\..+|transformer_blocks\.\d+\.attn2\.to_[kv]",
        "sample": r"time_embed\..+",
    }
    architectures: ClassVar[dict[str, Architecture]] = {
        "sana-1.5-1.6b": Architecture(_CONFIG, _LATENT, 1, _TEXT),
        "sana-1.5-4.8b": Architecture({**_CONFIG, "num_layers": 60}, _LATENT, 1, _TEXT),
    }
    text_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast", *ANY_TOKENIZER),
        "text_encoder": ("Gemma2Model",),
    }
    toy_text = ToyText(
        "SanaPipeline",
        (gemma(sana_instruction),),
        text_widths=("caption_channels",),
        scheduler="DPMSolverMultistepScheduler",
        settings=lambda flow_shift: {
            "flow_shift": flow_shift,
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
        },
    )

    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        """Without positions, which are the same function of the place before and after."""
        return child(model, self.backbone.ends(config).embedder)(latents).permute(0, 2, 3, 1)

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """As SanaPipeline calls it: whole time steps floor(1000 sigma), as in SANA's training; Sprint takes sigma."""
        config = model_config(model)
        guided = config.get("guidance_embeds", False)
        if guided and guidance is None:
            raise ValueError("this SANA (Sprint) has a guidance embedding: pass guidance (B,)")
        _check_latent(config, latents)
        return model(
            hidden_states=latents,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond.get("mask"),
            timestep=sigma if guided else network_timestep(sigma, config.get("timestep_scale", 1.0)),
            guidance=guidance * config["guidance_embeds_scale"] if guided and guidance is not None else None,
            return_dict=False,
        )[0]

    def attention_flops(self, config: Mapping[str, Any], image: int, text: int) -> float:
        """Linear attention, which has a row of ones beside the values, and cross-attention to the text."""
        head = config["attention_head_dim"]
        own = config["num_attention_heads"] * head * (2 * head + 1)
        cross = 2 * config["num_cross_attention_heads"] * config["cross_attention_head_dim"] * text
        return 2.0 * config["num_layers"] * image * (own + cross)

    def text_encoder(
        self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
    ) -> TextEncoder:
        return SanaText(base, device, dtype, tokens)

    def tiny(self, guidance_embeds: bool) -> TinyRelease:
        """2 x 16-wide heads, two blocks, on an f8 DC-AE; not distilled."""
        gemma2 = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        ends = {"pad_token_id": 0, "eos_token_id": END, "bos_token_id": END}
        return TinyRelease(
            "SanaPipeline",
            {
                "in_channels": 8,
                "out_channels": 8,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 32,
                "caption_channels": 24,
                "sample_size": 8,
                "qk_norm": "rms_norm_across_heads",
            },
            partial(tiny_dcae, stages=4),
            (
                "DPMSolverMultistepScheduler",
                {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            ),
            {"Gemma2Model": tiny_text("Gemma2Model", "Gemma2Config", **gemma2, **ends, head_dim=12)},
        )


class SanaText:
    """Gemma's hidden states through SanaPipeline's own encode_prompt: instruction before a prompt, none before ""."""

    def __init__(self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None) -> None:
        from diffusers import SanaPipeline

        classes = Sana.text_parts
        tokenizer = load_part(base, "tokenizer", classes["tokenizer"])
        encoder = load_part(base, "text_encoder", classes["text_encoder"], dtype).to(device)
        parts = {"tokenizer": tokenizer, "text_encoder": encoder}
        self.pipeline: Any = SanaPipeline(**parts, vae=None, transformer=None, scheduler=None)
        self.instruction = sana_instruction()
        self.device = device
        self.tokens = tokens or 300

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Cond:
        """prompt_embeds (B,T,D) and mask (B,T), float32: one forward pass, and another for empty captions."""
        with_text = torch.tensor([bool(caption) for caption in captions])
        encoded = [
            self._encode([caption for caption in captions if bool(caption) == kind], self.instruction if kind else None)
            for kind in (True, False)
            if (with_text == kind).any()
        ]
        # where each caption is in what was encoded: those with text first, both kinds in their order
        order = torch.argsort((~with_text).int(), stable=True).argsort().to(self.device)
        return {name: torch.cat([part[name] for part in encoded])[order] for name in encoded[0]}

    def _encode(self, captions: list[str], instruction: list[str] | None) -> Cond:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.tokens,
            complex_human_instruction=instruction,
        )
        return {"prompt_embeds": embeds.float(), "mask": mask.float()}


def _check_latent(config: Config, latents: Tensor) -> None:
    if latents.shape[1] != config["in_channels"]:
        raise ValueError(
            f"This SANA takes latents of {config['in_channels']} channels, got {latents.shape[1]}: the latent "
            "belongs to another autoencoder than the model."
        )
    p = config.get("patch_size", 1)
    if latents.shape[2] % p or latents.shape[3] % p:
        raise ValueError(f"latent of {tuple(latents.shape[2:])} does not divide into {p}x{p} patches")


FAMILY = Sana()

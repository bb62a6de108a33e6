# B batch, C latent channels, h w latent rows and columns, p patch size, N image tokens, T text tokens, D width
"""Z-Image: how the network is called and trained, Qwen3 as its pipeline has it, and a tiny release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from dcgen.backbones import BACKBONES, Config
from dcgen.backbones.zimage import PROMPT, TEXT_TOKENS, TOKEN_MULTIPLE
from train.conditioning import Cond, CondField, Role
from train.family import Architecture, Family, TextEncoder, TinyRelease, child, model_config
from train.text_parts import ANY_TOKENIZER, load_part
from train.tiny import END, tiny_kl, tiny_text

_CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
}
_ON_F32 = {**_CONFIG, "in_channels": 32, "all_patch_size": [1]}
_TEXT = (TEXT_TOKENS, 2560)
_LAYERS = r"(layers|noise_refiner|context_refiner)\.\d+\."


class ZImage(Family):
    """Z-Image. cond: prompt_embeds (B,T,Dc) and mask (B,T), 1 for a token; no guidance embedding.

    The network counts time from noise, t = 1 - sigma, and gives data - noise, the velocity with the opposite sign.
    """

    backbone = BACKBONES["zimage"]
    # Attention and MLP of every block, the refiners' too, as the released DC-Gen code has them.
    lora_targets = (_LAYERS + r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",)
    fields: ClassVar[dict[str, CondField]] = {
        "prompt_embeds": CondField(Role.TEXT, ragged=True),
        "mask": CondField(Role.MASK),
    }
    output_sign = -1
    token_layers: ClassVar[dict[str, str]] = {
        "text": r"cap_embedder\..+|context_refiner\.\d+\.(attention|feed_forward)\..+",
        "joint": r"layers\.\d+\.(attention|feed_forward)\..+|all_final_layer\.\d+-1\.linear",
        "sample": r"t_embedder\..+|(layers|noise_refiner)\.\d+\.adaLN_modulation\..+|all_final_layer\..+\.adaLN_.+",
    }
    architectures: ClassVar[dict[str, Architecture]] = {
        "z-image": Architecture(_CONFIG, "flux-f8c16", 2, _TEXT),
        "dc-gen-z-image-f32": Architecture(_ON_F32, "dc-ae-f32c32-in-1.0", 1, _TEXT),
        "dc-gen-z-image-f64": Architecture({**_ON_F32, "in_channels": 128}, "dc-ae-1.5-f64c128", 1, _TEXT),
    }
    text_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast", *ANY_TOKENIZER),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
    }

    def patches(self, latents: Tensor, p: int) -> Tensor:
        """Channels last within a patch."""
        return rearrange(latents, "B C (h ph) (w pw) -> B h w (ph pw C)", ph=p, pw=p)

    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        p = self._patch(config, latents)
        return child(model, f"all_x_embedder.{p}-1")(self.patches(latents, p))

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """As diffusers' ZImagePipeline calls it, each text at its own length."""
        p = self._patch(model_config(model), latents)
        rows = zip(cond["prompt_embeds"], cond["mask"] > 0, strict=True)
        out = model(
            list(latents.unsqueeze(2)),
            1 - sigma,
            [text[kept] for text, kept in rows],
            patch_size=p,
            return_dict=False,
        )[0]
        return self.output_sign * torch.stack(list(out)).squeeze(2)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Those that the image passes; the text's refiner is two small blocks."""
        return [*child(model, "noise_refiner"), *child(model, "layers")]

    def image_tokens(self, output: Any, grid: tuple[int, int]) -> Tensor:
        """The image comes first, before its padding and the text."""
        return output[:, : grid[0] * grid[1]].unflatten(1, grid)

    def attention_flops(self, config: Mapping[str, Any], image: int, text: int) -> float:
        """All look at each other in the layers, image and text at themselves in the refiners; both are padded."""
        image, text = (-(-count // TOKEN_MULTIPLE) * TOKEN_MULTIPLE for count in (image, text))
        joint = config["n_layers"] * (image + text) ** 2
        return 4.0 * config["dim"] * (joint + config["n_refiner_layers"] * (image**2 + text**2))

    def text_encoder(
        self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
    ) -> TextEncoder:
        return Qwen3Text(base, device, dtype, tokens)

    def tiny(self, guidance_embeds: bool) -> TinyRelease:
        """2 x 16-wide heads, one block of each kind, on an f4 VAE; it has no guidance embedding."""
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        qwen = {**sizes, "head_dim": 12, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": END}
        return TinyRelease(
            "ZImagePipeline",
            {
                "in_channels": 4,
                "dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 24,
                "axes_dims": [4, 6, 6],
                "axes_lens": [1024, 64, 64],
            },
            tiny_kl,
            ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
            {"Qwen3Model": tiny_text("Qwen3Model", "Qwen3Config", **qwen, bos_token_id=None)},
        )

    def _patch(self, config: Mapping[str, Any], latents: Tensor) -> int:
        if latents.shape[1] != config["in_channels"]:
            raise ValueError(
                f"this Z-Image takes latents of {config['in_channels']} channels, got {latents.shape[1]}: the latent "
                "belongs to another autoencoder than the model."
            )
        p = int(config["all_patch_size"][0])
        if latents.shape[2] % p or latents.shape[3] % p:
            raise ValueError(f"latent of {tuple(latents.shape[2:])} does not divide into {p}x{p} patches")
        return p


class Qwen3Text:
    """Qwen3's last hidden state but one, as ZImagePipeline has it: in its chat format, without padding."""

    def __init__(self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None) -> None:
        parts = ZImage.text_parts
        self.tokenizer = load_part(base, "tokenizer", parts["tokenizer"])
        self.encoder = load_part(base, "text_encoder", parts["text_encoder"], dtype).to(device)
        self.device = device
        self.tokens = tokens or min(self.tokenizer.model_max_length, TEXT_TOKENS)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Cond:
        """prompt_embeds (B,T,D) and mask (B,T), float32."""
        texts = [PROMPT.format(caption) for caption in captions]
        batch = self.tokenizer(
            texts, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        ).to(self.device)
        out = self.encoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
        )
        return {"prompt_embeds": out.hidden_states[-2].float(), "mask": batch.attention_mask.float()}


FAMILY = ZImage()

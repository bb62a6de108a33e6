"""Stage `tiny`: a random release and DC-AE of a few kilobytes, and pictures, so that a recipe runs in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from train.config import StageConfig
from train.files import write_folder, write_json
from train.stages.base import Stage

WORDS = ["a", "red", "green", "blue", "yellow", "dark", "light", "square", "on", "the", "left", "right"]
PIXELS = 64
COLORS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210), "yellow": (230, 220, 60)}
SIDES = ("left", "right")


class TinyStage(Stage):
    """Writes FOLDER/release (diffusers layout), FOLDER/dc-ae (f16) and FOLDER/pictures, all random from the seed."""

    class Config(StageConfig):
        backbone: Literal["flux", "sana", "dit"] = "flux"
        pictures: int = Field(12, ge=1)
        guidance_embeds: bool = Field(True, description="whether the base takes a guidance scale (is distilled)")

    config: Config

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        if self.context.rank == 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.context.recipe.seed)
                write_folder(self.folder / "release", lambda f: NETWORKS[self.config.backbone](f, self.config))
                write_folder(self.folder / "dc-ae", lambda f: tiny_dcae().save_pretrained(f))
            write_folder(
                self.folder / "pictures", lambda f: _pictures(f, self.config.pictures, self.context.recipe.seed)
            )
        return {"pictures": self.config.pictures}


def tiny_flux(folder: Path, config: TinyStage.Config) -> None:
    """A FLUX release in the diffusers layout: 2 x 16-wide heads, one block of each kind."""
    import diffusers

    transformer: Any = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=config.guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    # diffusers' own initialisation leaves modulation near zero: make every path count
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    transformer.save_pretrained(folder / "transformer")
    tiny_kl().save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    _tiny_clip(folder)
    _tiny_t5(folder)
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    parts |= {"text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"]}
    parts |= {name: ["transformers", "PreTrainedTokenizerFast"] for name in ("tokenizer", "tokenizer_2")}
    write_json(folder / "model_index.json", {"_class_name": "FluxPipeline", "_diffusers_version": "0.36.0", **parts})


def tiny_sana(folder: Path, config: TinyStage.Config) -> None:
    """A SANA release on an f8 DC-AE: 2 x 16-wide heads, two blocks."""
    import diffusers

    transformer: Any = diffusers.SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    transformer.save_pretrained(folder / "transformer")
    tiny_dcae(stages=4).save_pretrained(folder / "vae")
    diffusers.DPMSolverMultistepScheduler(
        flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    ).save_pretrained(folder / "scheduler")
    _tiny_gemma(folder)
    parts = {"transformer": ["diffusers", "SanaTransformer2DModel"], "vae": ["diffusers", "AutoencoderDC"]}
    parts |= {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    parts |= {"text_encoder": ["transformers", "Gemma2Model"], "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    write_json(folder / "model_index.json", {"_class_name": "SanaPipeline", "_diffusers_version": "0.36.0", **parts})


def tiny_dit(folder: Path, config: TinyStage.Config) -> None:
    """A class-conditional DiT on the f4 VAE with a learned variance; classes are the captions."""
    import diffusers

    transformer: Any = diffusers.DiTTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=1,
        attention_head_dim=64,
        num_embeds_ada_norm=8,
        sample_size=16,
        patch_size=2,
        norm_type="ada_norm_zero",
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    # one time and class embedder, of which diffusers keeps a copy in every block
    shared = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    transformer.save_pretrained(folder / "transformer")
    tiny_kl().save_pretrained(folder / "vae")
    diffusers.DDIMScheduler(beta_end=0.02, beta_start=0.0001, clip_sample=False).save_pretrained(folder / "scheduler")
    captions = [f"a {color} square on the {side}" for side in SIDES for color in COLORS]
    parts = {"transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    labels = {str(number): caption for number, caption in enumerate(captions)}
    index = {"_class_name": "DiTPipeline", "_diffusers_version": "0.36.0", "id2label": labels, **parts}
    write_json(folder / "model_index.json", index)


NETWORKS: dict[str, Callable[[Path, Any], None]] = {"flux": tiny_flux, "sana": tiny_sana, "dit": tiny_dit}


def tiny_kl() -> Any:
    """An f4 AutoencoderKL with 4 latent channels and a shift."""
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def tiny_dcae(stages: int = 5) -> Any:
    """An AutoencoderDC of f = 2^(stages-1) with 8 latent channels and one attention stage."""
    import diffusers

    kinds = ("ResBlock",) * (stages - 1) + ("EfficientViTBlock",)
    widths = (8,) * (stages - 1) + (16,)
    scales = ((),) * (stages - 1) + ((5,),)
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(1,) * stages,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=0.5,
    )


def _tiny_clip(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _word_tokenizer(16)
    size = len(tokenizer)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


def _tiny_t5(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    tokenizer = _word_tokenizer(16)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=24,
        d_kv=12,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_2")
    tokenizer.save_pretrained(folder / "tokenizer_2")


def _tiny_gemma(folder: Path) -> None:
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = _word_tokenizer(16)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    Gemma2Model(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


def _word_tokenizer(length: int) -> Any:
    """A tokenizer of whole words that ends every text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def _pictures(folder: Path, count: int, seed: int) -> None:
    """Coloured squares with captions beside them."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        name = list(COLORS)[number % len(COLORS)]
        side = SIDES[number // len(COLORS) % 2]
        array = rng.integers(0, 60, (PIXELS, PIXELS, 3), dtype=np.uint8) + (0 if number % 2 else 150)
        start = 6 if side == "left" else PIXELS - 30
        array[20:44, start : start + 24] = COLORS[name]
        Image.fromarray(array.astype(np.uint8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a {name} square on the {side}", encoding="utf-8")

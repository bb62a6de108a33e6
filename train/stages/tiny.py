"""Stage `tiny`: a random release and DC-AE of a few kilobytes, and pictures, so that a recipe runs in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from dcgen.backbones import BACKBONES
from train.config import StageConfig
from train.files import write_folder, write_json
from train.models import network_class
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
                write_folder(self.folder / "release", lambda f: write_tiny(f, self.config))
                write_folder(self.folder / "dc-ae", lambda f: tiny_dcae().save_pretrained(f))
            write_folder(
                self.folder / "pictures", lambda f: _pictures(f, self.config.pictures, self.context.recipe.seed)
            )
        return {"pictures": self.config.pictures}


def _flux(config: TinyStage.Config) -> dict[str, Any]:
    """2 x 16-wide heads, one block of each kind."""
    return {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "guidance_embeds": config.guidance_embeds,
        "axes_dims_rope": (4, 6, 6),
    }


def _sana(config: TinyStage.Config) -> dict[str, Any]:
    """2 x 16-wide heads, two blocks, on an f8 DC-AE."""
    return {
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
    }


def _dit(config: TinyStage.Config) -> dict[str, Any]:
    """One 64-wide head, two blocks, a learned variance; 8 classes."""
    return {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 1,
        "attention_head_dim": 64,
        "num_embeds_ada_norm": 8,
        "sample_size": 16,
        "patch_size": 2,
        "norm_type": "ada_norm_zero",
    }


@dataclass(frozen=True)
class Family:
    """A release in the diffusers layout: its classes, and what makes its parts."""

    pipeline: str
    sizes: Callable[[Any], dict[str, Any]]
    autoencoder: Callable[[], Any]
    scheduler: tuple[str, dict[str, Any]]
    text: dict[str, Callable[[Path, Path], None]]  # class of each encoder -> what writes it and its tokenizer


def write_tiny(folder: Path, config: TinyStage.Config) -> None:
    """A release of the named backbone with random weights."""
    import diffusers

    family = FAMILIES[config.backbone]
    transformer = network_class(BACKBONES[config.backbone])(**family.sizes(config))
    # diffusers' own initialisation leaves modulation near zero: make every path count
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    if config.backbone == "dit":
        # one time and class embedder, of which diffusers keeps a copy in every block
        shared = transformer.transformer_blocks[0].norm1.emb.state_dict()
        for block in transformer.transformer_blocks:
            block.norm1.emb.load_state_dict(shared)
    autoencoder = family.autoencoder()
    scheduler, settings = family.scheduler
    parts = {"transformer": transformer, "vae": autoencoder, "scheduler": getattr(diffusers, scheduler)(**settings)}
    index: dict[str, Any] = {"_class_name": family.pipeline, "_diffusers_version": "0.36.0"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    for number, (encoder, write) in enumerate(family.text.items()):
        end = f"_{number + 1}" if number else ""
        write(folder / f"text_encoder{end}", folder / f"tokenizer{end}")
        index |= {f"text_encoder{end}": ["transformers", encoder]}
        index |= {f"tokenizer{end}": ["transformers", "PreTrainedTokenizerFast"]}
    if config.backbone == "dit":
        captions = [f"a {color} square on the {side}" for side in SIDES for color in COLORS]
        index["id2label"] = {str(number): caption for number, caption in enumerate(captions)}
    write_json(folder / "model_index.json", index)


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


def _text(config: str, encoder: str, fields: Callable[[Any], dict[str, Any]]) -> Callable[[Path, Path], None]:
    """What writes an encoder of that transformers class, and a tokenizer of whole words, into two folders."""

    def write(encoder_folder: Path, tokenizer_folder: Path) -> None:
        import transformers

        tokenizer = _word_tokenizer(16)
        sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, **fields(tokenizer)}
        getattr(transformers, encoder)(getattr(transformers, config)(**sizes)).save_pretrained(encoder_folder)
        tokenizer.save_pretrained(tokenizer_folder)

    return write


def _clip_sizes(tokenizer: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16}
    return {**sizes, **ends}


def _t5_sizes(tokenizer: Any) -> dict[str, Any]:
    return {"d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def _gemma_sizes(tokenizer: Any) -> dict[str, Any]:
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return {**sizes, **ends, "head_dim": 12}


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


FAMILIES = {
    "flux": Family(
        "FluxPipeline",
        _flux,
        tiny_kl,
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        {
            "CLIPTextModel": _text("CLIPTextConfig", "CLIPTextModel", _clip_sizes),
            "T5EncoderModel": _text("T5Config", "T5EncoderModel", _t5_sizes),
        },
    ),
    "sana": Family(
        "SanaPipeline",
        _sana,
        partial(tiny_dcae, stages=4),
        (
            "DPMSolverMultistepScheduler",
            {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        ),
        {"Gemma2Model": _text("Gemma2Config", "Gemma2Model", _gemma_sizes)},
    ),
    "dit": Family(
        "DiTPipeline",
        _dit,
        tiny_kl,
        ("DDIMScheduler", {"beta_end": 0.02, "beta_start": 0.0001, "clip_sample": False}),
        {},
    ),
}

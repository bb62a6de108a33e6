"""Parts of the random releases that tests and the tiny recipes run on: autoencoders, text encoders, captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ["a", "red", "green", "blue", "yellow", "dark", "light", "square", "on", "the", "left", "right"]
COLORS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210), "yellow": (230, 220, 60)}
SIDES = ("left", "right")
END = 1  # number of the token that ends a text

WritePart = Callable[[Path, Path], None]


def caption(color: str, side: str) -> str:
    """The caption of an image."""
    return f"a {color} square on the {side}"


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


def tiny_packed_kl() -> Any:
    """An f4 AutoencoderKLFlux2 with 4 latent channels, packed to f8 and 16, and statistics that are not 0 and 1."""
    import diffusers
    import torch

    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    norm: Any = vae.bn
    norm.running_mean.copy_(0.1 * torch.randn(16))
    norm.running_var.copy_(0.5 + torch.rand(16))
    return vae


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


def tiny_text(encoder: str, config: str, **settings: Any) -> WritePart:
    """What writes a one-layer encoder of that transformers class, and a tokenizer of whole words, into two folders."""

    def write(encoder_folder: Path, tokenizer_folder: Path) -> None:
        import transformers

        tokenizer = _word_tokenizer(16)
        fields = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, **settings}
        getattr(transformers, encoder)(getattr(transformers, config)(**fields)).save_pretrained(encoder_folder)
        tokenizer.save_pretrained(tokenizer_folder)

    return write


def _word_tokenizer(length: int) -> Any:
    """A tokenizer of whole words that ends every text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )

"""What the toy's bases are made of beside their transformer: text encoders of a few kilobytes, or class labels."""
# B captions, T tokens, D text width

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dcgen.latent import LatentSpace
from train.files import write_tensors
from train.toy.tokenizers import (
    CLIP_TOKENS,
    T5_TOKENS,
    save_clip_tokenizer,
    save_gemma_tokenizer,
    save_t5_tokenizer,
)


@dataclass(frozen=True)
class Reader:
    """A text encoder: its two folders in the release, and how it is made, judged and named on disk."""

    name: str
    encoder: str
    tokenizer: str
    tokenizer_class: str
    save_tokenizer: Callable[[Sequence[str], Path], Any]
    ids: Callable[[Any, Sequence[str]], Tensor]  # (tokenizer, captions) -> (B,T)
    make: Callable[[Any, int, int], nn.Module]  # (tokenizer, width, layers)
    features: Callable[[Any, Tensor], Tensor]  # (encoder, ids (B,T)) -> (B,D), from which the caption is named
    rename: Callable[[Path], None] | None = None  # changes the folder that save_pretrained wrote


@dataclass(frozen=True)
class ToyText:
    """What a release with text encoders consists of besides transformer and vae."""

    pipeline: str
    readers: tuple[Reader, ...]
    text_widths: tuple[str, ...]  # fields of the transformer's config
    scheduler: str
    settings: Callable[[float], dict[str, Any]]  # of the scheduler, by the shift that the recipe asks for


@dataclass(frozen=True)
class ToyLabels:
    """What a class-conditional release consists of besides vae and labels."""

    pipeline: str
    config: Callable[[LatentSpace, int, int], dict[str, Any]]  # (latent, pixels, classes): what a recipe leaves out
    scheduler: str
    settings: Mapping[str, Any]


def _padded(length: int) -> Callable[[Any, Sequence[str]], Tensor]:
    """(tokenizer, captions) -> token ids (B,T) of that length."""

    def ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(captions), **options).input_ids

    return ids


def _clip(tokenizer: Any, width: int, layers: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=CLIP_TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _rename_clip(folder: Path) -> None:
    """Name CLIP's weights as published files do, which every transformers reads: release 5 writes shorter names.

    To transformers 4 the shorter ones are unknown: it would take random weights in their place, with a warning only.
    """
    file = folder / "model.safetensors"
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    write_tensors(file, named, {"format": "pt"})


def _t5(tokenizer: Any, width: int, layers: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=width // 32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def _gemma(tokenizer: Any, width: int, layers: int) -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _last_token(encoder: Any, ids: Tensor) -> Tensor:
    """(B,T) -> (B,D): the hidden state of the last token, the only one that has read the whole caption."""
    real = ids != encoder.config.pad_token_id
    hidden = encoder(ids, attention_mask=real.long())[0]
    return hidden[torch.arange(len(ids)), real.sum(1) - 1]


CLIP = Reader(
    "clip", "text_encoder", "tokenizer", "CLIPTokenizer", save_clip_tokenizer, _padded(CLIP_TOKENS), _clip,
    lambda encoder, ids: encoder(ids).pooler_output, _rename_clip,
)  # fmt: skip
T5 = Reader(
    "t5", "text_encoder_2", "tokenizer_2", "T5TokenizerFast", save_t5_tokenizer, _padded(T5_TOKENS), _t5,
    lambda encoder, ids: encoder(ids)[0].mean(1),
)  # fmt: skip


def gemma(instruction: Callable[[], Sequence[str]]) -> Reader:
    """Gemma, which reads these lines in front of every caption."""

    def save(captions: Sequence[str], folder: Path) -> Any:
        return save_gemma_tokenizer(captions, "\n".join(instruction()), folder)

    def ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
        """Token ids (B,T) of instruction and caption, padded to the longest."""
        texts = ["\n".join(instruction()) + caption for caption in captions]
        return tokenizer(texts, padding=True, return_tensors="pt").input_ids

    return Reader("gemma", "text_encoder", "tokenizer", "PreTrainedTokenizerFast", save, ids, _gemma, _last_token)

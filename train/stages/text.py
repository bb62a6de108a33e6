"""Stage `text`: the toy's text encoders, trained to tell captions apart, and a FLUX or SANA release around them."""
# B captions, T tokens, D text width, S subjects, K colours

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from dcgen.backbones import BACKBONES
from train.autoencoders import autoencoder_config
from train.batches import Batch
from train.config import StageConfig
from train.files import write_folder, write_json, write_tensors
from train.models import network_class
from train.stages.base import Context, Stage, complaints
from train.text import sana_instruction
from train.toy.pictures import ToyPictures
from train.toy.tokenizers import (
    CLIP_TOKENS,
    T5_TOKENS,
    save_clip_tokenizer,
    save_gemma_tokenizer,
    save_t5_tokenizer,
)


class TextStage(Stage):
    """Each text encoder of the base's kind names subject and colour of the training captions.

    Writes FOLDER/release: the release in the diffusers layout, with the given VAE and a random transformer.
    """

    class Config(StageConfig):
        kind: Literal["text"] = "text"
        backbone: Literal["flux", "sana"] = Field("flux", description="which base the release is")
        data: str = Field("toy/data", description="folder of captions.json")
        vae: str = Field(description="folder of the autoencoder that the release gets")
        width: int = Field(64, ge=8, description="of all text encoders")
        layers: int = Field(2, ge=1)
        transformer: dict[str, Any] = Field(description="arguments of the diffusers class, less the text widths")
        flow_shift: float = Field(3.0, gt=0, description="SANA only: of its scheduler; FLUX has its own rule")

    config: Config

    def __init__(self, config: StageConfig, context: Context) -> None:
        super().__init__(config, context)
        self.vae = context.resolve(self.config.vae)
        self.family = FAMILIES[self.config.backbone]

    def check(self) -> list[str]:
        return complaints(autoencoder_config, self.vae)

    def setup(self) -> nn.Module:
        pictures = ToyPictures(self.config.data)
        self.pairs = pictures.pairs("train")
        captions = [pictures.caption(pair) for pair in self.pairs]
        self.scratch = self.folder / "tokenizers"
        tokenizers = {r.name: r.save_tokenizer(captions, self.scratch / r.tokenizer) for r in self.family.readers}
        self.ids = {r.name: r.ids(tokenizers[r.name], captions).to(self.device) for r in self.family.readers}
        torch.manual_seed(self.context.recipe.seed)
        width, names = self.config.width, len(pictures.subjects) + len(pictures.colors)
        self.subjects = len(pictures.subjects)
        parts = {r.name: r.make(tokenizers[r.name], width, self.config.layers) for r in self.family.readers}
        heads: dict[str, nn.Module] = {f"{name}_names": nn.Linear(width, names) for name in parts}
        self.model = nn.ModuleDict({**parts, **heads})
        return self.model.to(self.device)

    def buckets(self) -> list[range]:
        return [range(len(self.pairs))]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        rows = list(batch.indices)
        subject = torch.tensor([self.pairs[i].subject for i in rows], device=self.device)
        color = torch.tensor([self.pairs[i].color for i in rows], device=self.device)
        total, right = torch.zeros((), device=self.device), {}
        for reader in self.family.readers:
            features = reader.features(self.model[reader.name], self.ids[reader.name][rows])
            logits = self.model[f"{reader.name}_names"](features)
            for label, part in ((subject, logits[:, : self.subjects]), (color, logits[:, self.subjects :])):
                total = total + F.cross_entropy(part, label)
            right[f"{reader.name}_right"] = (logits[:, : self.subjects].argmax(1) == subject).float().mean()
        return total, right

    @torch.no_grad()
    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        self.model.load_state_dict({**self.model.state_dict(), **weights})
        if self.context.rank == 0:
            write_folder(self.folder / "release", self._write_release)
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def _write_release(self, folder: Path) -> None:
        import diffusers

        torch.manual_seed(self.context.recipe.seed)
        backbone = BACKBONES[self.config.backbone]
        widths = dict.fromkeys(self.family.text_widths, self.config.width)
        network_class(backbone)(**self.config.transformer, **widths).save_pretrained(folder / "transformer")
        shutil.copytree(self.vae, folder / "vae")
        scheduler: Any = self.family.scheduler(self.config.flow_shift)
        scheduler.save_pretrained(folder / "scheduler")
        index: dict[str, Any] = {"_class_name": self.family.pipeline, "_diffusers_version": diffusers.__version__}
        index |= {"transformer": ["diffusers", backbone.diffusers_class]}
        index |= {"vae": ["diffusers", autoencoder_config(self.vae)["_class_name"]]}
        index |= {"scheduler": ["diffusers", type(scheduler).__name__]}
        for reader in self.family.readers:
            encoder: Any = self.model[reader.name]
            encoder.save_pretrained(folder / reader.encoder)
            if reader is CLIP:
                _as_published(folder / reader.encoder / "model.safetensors")
            shutil.copytree(self.scratch / reader.tokenizer, folder / reader.tokenizer)
            index |= {reader.encoder: ["transformers", type(encoder).__name__]}
            index |= {reader.tokenizer: ["transformers", reader.tokenizer_class]}
        write_json(folder / "model_index.json", index)


def _as_published(file: Path) -> None:
    """Name CLIP's weights as published files do, which every transformers reads: release 5 writes shorter names.

    To transformers 4 the shorter ones are unknown: it would take random weights in their place, with a warning only.
    """
    tensors = load_file(file)
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    write_tensors(file, named, {"format": "pt"})


def _padded(length: int) -> Callable[[Any, Sequence[str]], Tensor]:
    """(tokenizer, captions) -> token ids (B,T) of that length."""

    def ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
        how = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(captions), **how).input_ids

    return ids


def _instructed(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Token ids (B,T) of SANA's instruction and a caption, padded to the longest."""
    instruction = "\n".join(sana_instruction())
    texts = [instruction + caption for caption in captions]
    return tokenizer(texts, padding=True, return_tensors="pt").input_ids


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


def _flux_scheduler(shift: float) -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip


def _sana_scheduler(shift: float) -> Any:
    import diffusers

    return diffusers.DPMSolverMultistepScheduler(
        flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"
    )


@dataclass(frozen=True)
class Reader:
    """A text encoder: its two folders in the release, and how it is made and judged."""

    name: str
    encoder: str
    tokenizer: str
    tokenizer_class: str
    save_tokenizer: Callable[[Sequence[str], Path], Any]
    ids: Callable[[Any, Sequence[str]], Tensor]  # (tokenizer, captions) -> (B,T)
    make: Callable[[Any, int, int], nn.Module]  # (tokenizer, width, layers)
    features: Callable[[Any, Tensor], Tensor]  # (encoder, ids (B,T)) -> (B,D), from which the caption is named


@dataclass(frozen=True)
class Family:
    """What a release of one kind consists of besides transformer and vae."""

    pipeline: str
    readers: tuple[Reader, ...]
    text_widths: tuple[str, ...]  # fields of the transformer's config
    scheduler: Callable[[float], Any]


CLIP = Reader(
    "clip", "text_encoder", "tokenizer", "CLIPTokenizer", save_clip_tokenizer, _padded(CLIP_TOKENS), _clip,
    lambda encoder, ids: encoder(ids).pooler_output,
)  # fmt: skip
T5 = Reader(
    "t5", "text_encoder_2", "tokenizer_2", "T5TokenizerFast", save_t5_tokenizer, _padded(T5_TOKENS), _t5,
    lambda encoder, ids: encoder(ids)[0].mean(1),
)  # fmt: skip
GEMMA = Reader(
    "gemma", "text_encoder", "tokenizer", "PreTrainedTokenizerFast",
    lambda captions, folder: save_gemma_tokenizer(captions, "\n".join(sana_instruction()), folder),
    _instructed, _gemma, _last_token,
)  # fmt: skip
FAMILIES = {
    "flux": Family("FluxPipeline", (CLIP, T5), ("joint_attention_dim", "pooled_projection_dim"), _flux_scheduler),
    "sana": Family("SanaPipeline", (GEMMA,), ("caption_channels",), _sana_scheduler),
}

"""Stage `text`: the toy's text encoders, trained to tell captions apart, and a FLUX release around them."""
# B captions, T tokens, D text width, S subjects, K colours

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from train.autoencoders import autoencoder_config
from train.batches import Batch
from train.config import StageConfig
from train.files import write_folder, write_json
from train.stages.base import Context, Stage, complaints
from train.toy.pictures import ToyPictures
from train.toy.tokenizers import CLIP_TOKENS, T5_TOKENS, save_clip_tokenizer, save_t5_tokenizer

CLASSES = {
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
}


class TextStage(Stage):
    """CLIP's pooled output and T5's mean each name subject and colour of the training captions.

    Writes FOLDER/release: the FLUX release in the diffusers layout, with the given VAE and a random transformer.
    """

    class Config(StageConfig):
        kind: Literal["text"] = "text"
        data: str = Field("toy/data", description="folder of captions.json")
        vae: str = Field(description="folder of the AutoencoderKL that the release gets")
        width: int = Field(64, ge=8, description="of both text encoders")
        layers: int = Field(2, ge=1)
        transformer: dict[str, Any] = Field(description="arguments of FluxTransformer2DModel, less the text widths")

    config: Config

    def __init__(self, config: StageConfig, context: Context) -> None:
        super().__init__(config, context)
        self.vae = context.resolve(self.config.vae)

    def check(self) -> list[str]:
        return complaints(autoencoder_config, self.vae)

    def setup(self) -> nn.Module:
        pictures = ToyPictures(self.config.data)
        self.pairs = pictures.pairs("train")
        captions = [pictures.caption(pair) for pair in self.pairs]
        self.scratch = self.folder / "tokenizers"
        self.clip_tokenizer = save_clip_tokenizer(captions, self.scratch / "tokenizer")
        self.t5_tokenizer = save_t5_tokenizer(captions, self.scratch / "tokenizer_2")
        self.ids = {
            "clip": _ids(self.clip_tokenizer, captions, CLIP_TOKENS).to(self.device),
            "t5": _ids(self.t5_tokenizer, captions, T5_TOKENS).to(self.device),
        }
        torch.manual_seed(self.context.recipe.seed)
        width, names = self.config.width, len(pictures.subjects) + len(pictures.colors)
        self.subjects = len(pictures.subjects)
        self.model = nn.ModuleDict(
            {
                "clip": _clip(len(self.clip_tokenizer), self.clip_tokenizer, width, self.config.layers),
                "t5": _t5(len(self.t5_tokenizer), width, self.config.layers),
                "clip_names": nn.Linear(width, names),
                "t5_names": nn.Linear(width, names),
            }
        )
        return self.model.to(self.device)

    def buckets(self) -> list[range]:
        return [range(len(self.pairs))]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        rows = list(batch.indices)
        subject = torch.tensor([self.pairs[i].subject for i in rows], device=self.device)
        color = torch.tensor([self.pairs[i].color for i in rows], device=self.device)
        pooled = self.model["clip"](self.ids["clip"][rows]).pooler_output
        hidden = self.model["t5"](self.ids["t5"][rows])[0]
        total, right = pooled.new_zeros(()), {}
        for name, features in (("clip", pooled), ("t5", hidden.mean(1))):
            logits = self.model[f"{name}_names"](features)
            for label, part in ((subject, logits[:, : self.subjects]), (color, logits[:, self.subjects :])):
                total = total + F.cross_entropy(part, label)
            right[f"{name}_right"] = (logits[:, : self.subjects].argmax(1) == subject).float().mean()
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
        width = self.config.width
        transformer = diffusers.FluxTransformer2DModel(
            **self.config.transformer, joint_attention_dim=width, pooled_projection_dim=width
        )
        transformer.save_pretrained(folder / "transformer")
        shutil.copytree(self.vae, folder / "vae")
        diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        ).save_pretrained(folder / "scheduler")  # fmt: skip
        for name, part in (("clip", "text_encoder"), ("t5", "text_encoder_2")):
            encoder: Any = self.model[name]
            encoder.save_pretrained(folder / part)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(self.scratch / name, folder / name)
        versions = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
        write_json(folder / "model_index.json", {**versions, **CLASSES})


def _ids(tokenizer: Any, captions: list[str], length: int) -> Tensor:
    batch = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


def _clip(vocabulary: int, tokenizer: Any, width: int, layers: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
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


def _t5(vocabulary: int, width: int, layers: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
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

"""Stage `text`: the toy's text encoders, trained to tell captions apart, and a release around them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from dcgen.folder import TRANSFORMER, VAE, autoencoder_config
from train.batches import Batch
from train.config import StageConfig, one_of
from train.families import DEFAULT, FAMILIES
from train.files import write_folder, write_json
from train.inputs import Read, tree
from train.stages.base import Context, Stage, complaints
from train.toy.pictures import ToyPictures, toy_read

WITH_TEXT = {name: family.toy_text for name, family in FAMILIES.items() if family.toy_text is not None}


class TextStage(Stage):
    """Each text encoder of the base's kind names subject and colour of the training captions.

    Writes FOLDER/release: the release in the diffusers layout, with the given VAE and a random transformer.
    """

    class Config(StageConfig):
        kind: Literal["text"] = "text"
        backbone: str = Field(DEFAULT, description="which base the release is")
        data: str = Field("toy/data", description="folder of captions.json")
        vae: str = Field(description="folder of the autoencoder that the release gets")
        width: int = Field(64, ge=8, description="of all text encoders")
        layers: int = Field(2, ge=1)
        transformer: dict[str, Any] = Field(description="arguments of the diffusers class, less the text widths")
        flow_shift: float = Field(3.0, gt=0, description="of the scheduler, where that has no rule of its own")

        @field_validator("backbone")
        @classmethod
        def _a_family(cls, value: str) -> str:
            return one_of(value, WITH_TEXT)

    config: Config

    def __init__(self, config: StageConfig, context: Context) -> None:
        super().__init__(config, context)
        self.vae = context.resolve(self.config.vae)
        self.toy = WITH_TEXT[self.config.backbone]

    def check(self) -> list[str]:
        return complaints(autoencoder_config, self.vae)

    free_reads = frozenset({"vae"})

    def reads(self) -> dict[str, Read]:
        return {"data": toy_read(self.config.data), "vae": tree(self.vae)}

    def result_bytes(self, trained: int) -> int:
        return 4 * trained + tree(self.vae).size

    def setup(self) -> nn.Module:
        pictures = ToyPictures(self.config.data)
        self.pairs = pictures.pairs("train")
        captions = [pictures.caption(pair) for pair in self.pairs]
        self.scratch = self.folder / "tokenizers"
        tokenizers = {r.name: r.save_tokenizer(captions, self.scratch / r.tokenizer) for r in self.toy.readers}
        self.ids = {r.name: r.ids(tokenizers[r.name], captions).to(self.device) for r in self.toy.readers}
        torch.manual_seed(self.context.recipe.seed)
        width, names = self.config.width, len(pictures.subjects) + len(pictures.colors)
        self.subjects = len(pictures.subjects)
        parts = {r.name: r.make(tokenizers[r.name], width, self.config.layers) for r in self.toy.readers}
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
        for reader in self.toy.readers:
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
        family = FAMILIES[self.config.backbone]
        widths = dict.fromkeys(self.toy.text_widths, self.config.width)
        family.network_class()(**self.config.transformer, **widths).save_pretrained(folder / TRANSFORMER)
        shutil.copytree(self.vae, folder / VAE)
        settings = self.toy.settings(self.config.flow_shift)
        getattr(diffusers, self.toy.scheduler)(**settings).save_pretrained(folder / "scheduler")
        index: dict[str, Any] = {"_class_name": self.toy.pipeline, "_diffusers_version": diffusers.__version__}
        index |= {TRANSFORMER: ["diffusers", family.backbone.diffusers_class]}
        index |= {VAE: ["diffusers", autoencoder_config(self.vae)["_class_name"]]}
        index |= {"scheduler": ["diffusers", self.toy.scheduler]}
        for reader in self.toy.readers:
            encoder: Any = self.model[reader.name]
            encoder.save_pretrained(folder / reader.encoder)
            if reader.rename is not None:
                reader.rename(folder / reader.encoder)
            shutil.copytree(self.scratch / reader.tokenizer, folder / reader.tokenizer)
            index |= {reader.encoder: ["transformers", type(encoder).__name__]}
            index |= {reader.tokenizer: ["transformers", reader.tokenizer_class]}
        write_json(folder / "model_index.json", index)

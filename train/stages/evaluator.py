"""Stage `evaluator`: the small network that judges toy images, trained to name subject and colour of real ones."""
# B images, H W pixels

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from train.batches import Batch
from train.config import StageConfig
from train.evaluate.judge import FIRST_UNSEEN, Evaluator
from train.files import write_folder
from train.inputs import Read
from train.stages.base import Stage
from train.toy.pictures import ToyPictures, toy_read

VARIANTS = 64


class EvaluatorStage(Stage):
    """Real images of all pairs, half of them blurred and grainy so that a soft image is judged by its content."""

    class Config(StageConfig):
        kind: Literal["evaluator"] = "evaluator"
        data: str = Field("toy/data", description="folder of captions.json")

    config: Config

    def reads(self) -> dict[str, Read]:
        return {"data": toy_read(self.config.data)}

    def result_bytes(self, trained: int) -> int:
        return 4 * trained

    def setup(self) -> nn.Module:
        self.pictures = ToyPictures(self.config.data)
        self.pairs = self.pictures.pairs("all")
        torch.manual_seed(self.context.recipe.seed)
        self.model = Evaluator(len(self.pictures.subjects), len(self.pictures.colors)).to(self.device)
        return self.model

    def buckets(self) -> list[range]:
        return [range(len(self.pairs) * VARIANTS)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        places = [divmod(index, VARIANTS) for index in batch.indices]
        pairs = [self.pairs[place] for place, _ in places]
        x = torch.stack([self.pictures.draw(self.pairs[p], variant) for p, variant in places]).to(self.device)
        subject, color = self.model(self._worsen(x, batch))
        wanted = torch.tensor([[p.subject, p.color] for p in pairs], device=self.device)
        total = F.cross_entropy(subject, wanted[:, 0]) + F.cross_entropy(color, wanted[:, 1])
        return total, {"subject_right": (subject.argmax(1) == wanted[:, 0]).float().mean()}

    def _worsen(self, x: Tensor, batch: Batch) -> Tensor:
        small = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
        blur = (batch.uniform("blur") < 0.5).float().reshape(-1, 1, 1, 1) * batch.uniform("how much", (1, 1, 1))
        grain = 0.1 * batch.uniform("grain", (1, 1, 1)) * batch.normal("noise", x.shape[1:])
        return x + blur * (small - x) + grain

    @torch.no_grad()
    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        """Write `model/`; the rates are on variants that training did not see."""
        self.model.load_state_dict(weights)
        self.model.eval()
        x = torch.stack([self.pictures.draw(pair, FIRST_UNSEEN) for pair in self.pairs])
        subject, color = self.model(x.to(self.device))
        wanted = torch.tensor([[p.subject, p.color] for p in self.pairs], device=self.device)
        if self.context.rank == 0:
            write_folder(self.folder / "model", self.model.save)
        rates = {"subject": subject.argmax(1) == wanted[:, 0], "color": color.argmax(1) == wanted[:, 1]}
        return {name: right.float().mean().item() for name, right in rates.items()}

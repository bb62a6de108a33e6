"""Embedding alignment, arXiv:2509.25180 Eq. 1, as the linear least-squares problem that it is.

The new embedder is affine in its parameters, so the loss over a data set is a quadratic form: one pass accumulates it
in float64 and gives the minimiser, the least possible loss, and the loss of any other embedder.
"""
# B batch, C latent channels, h w token rows and columns, p patch size, K = C*p*p values a token, D width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dcgen.backbones import Backbone
from train.family import Family

Resample = Literal["teacher-down", "student-up"]


def resample_pair(teacher: Tensor, student: Tensor, resample: Resample) -> tuple[Tensor, Tensor]:
    """Bring (B,h,w,D) and (B,h',w',D) to one grid.

    teacher-down: average pool of the teacher's (the paper); student-up: bilinear (the released code).
    """
    (h, w), (rows, columns) = teacher.shape[1:3], student.shape[1:3]
    if h % rows or w % columns:
        raise ValueError(
            f"teacher grid {h}x{w} is not a multiple of the student's {rows}x{columns}: were both cached at one size?"
        )
    if resample == "teacher-down":
        pooled = nn.functional.avg_pool2d(teacher.movedim(-1, 1), (h // rows, w // columns))
        return pooled.movedim(1, -1), student
    raised = nn.functional.interpolate(student.movedim(-1, 1), size=(h, w), mode="bilinear", align_corners=False)
    return teacher, raised.movedim(1, -1)


def alignment_loss(teacher: Tensor, student: Tensor, resample: Resample) -> Tensor:
    """Mean squared distance of embeddings (B,h,w,D), (B,h',w',D) on one grid. arXiv:2509.25180 Eq. 1."""
    target, output = resample_pair(teacher, student, resample)
    return nn.functional.mse_loss(output, target)


@dataclass
class NormalEquations:
    """Sums of Eq. 1 over the data in float64: features^T features, features^T targets, and the targets' moments."""

    xx: Tensor  # (K+1, K+1); the last feature is the constant 1
    xy: Tensor  # (K+1, D)
    yy: Tensor  # (): sum of squared targets
    y: Tensor  # (D,): sum of targets
    count: Tensor  # (): rows

    @classmethod
    def empty(cls, features: int, width: int, device: torch.device | str = "cpu") -> NormalEquations:
        """All zero, for K features and width D."""
        zeros = [
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((features + 1, features + 1), (features + 1, width), (), (width,), ())
        ]
        return cls(*zeros)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in rows: features (..., K) without the constant, targets (..., D)."""
        x = features.reshape(-1, features.shape[-1]).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        y = targets.reshape(-1, targets.shape[-1]).double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()
        self.y += y.sum(0)
        self.count += len(y)

    def reduce(self) -> None:
        """Sum over all ranks."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in (self.xx, self.xy, self.yy, self.y, self.count):
                dist.all_reduce(tensor)

    def solve(self, ridge: float = 0.0, bias: bool = True) -> tuple[Tensor, Tensor]:
        """(weight (D,K), bias (D,)) of least Eq. 1, float64; without `bias` that is 0.

        `ridge` is relative to the mean feature power and spares the bias. Directions that the data does not hold
        (a dead channel) get weight 0: the least-norm minimiser.
        """
        if self.count == 0:
            raise ValueError("no data was accumulated: Eq. 1 has no minimiser")
        system = self.xx.clone()
        if not bias:
            system[-1], system[:, -1] = 0, 0  # the constant becomes a feature that the data does not hold
        if ridge:
            power = self.xx.diagonal()[:-1].mean()
            system.diagonal()[:-1].add_(ridge * power)
        # unit diagonal first: the rank decision must not depend on the channels' scales
        diagonal = system.diagonal()
        scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
        inverse = torch.linalg.pinv(scale[:, None] * system * scale, rtol=1e-13, hermitian=True)
        theta = scale[:, None] * (inverse @ (scale[:, None] * self.xy))
        return theta[:-1].T.contiguous(), theta[-1].contiguous()

    def loss(self, weight: Tensor, bias: Tensor) -> float:
        """Eq. 1's mean over the data for an embedder weight (D,K), bias (D,)."""
        theta = torch.cat([weight.double().T, bias.double()[None]]).to(self.xx.device)
        residual = self.yy - 2 * (theta * self.xy).sum() + (theta * (self.xx @ theta)).sum()
        return float(residual.clamp_min(0) / (self.count * self.xy.shape[1]))

    def variance(self) -> float:
        """Mean variance of the targets: Eq. 1 of the best constant."""
        return float((self.yy - (self.y**2).sum() / self.count) / (self.count * self.xy.shape[1]))


class LinearEmbedder:
    """A network's embedder on the new latent seen as features @ weight^T + bias + what does not depend on them."""

    def __init__(self, family: Family, model: nn.Module, config: dict[str, Any], patch_size: int) -> None:
        self.family = family
        self.model = model
        self.config = config
        self.p = patch_size
        embedder = family.backbone.ends(config).embedder
        self.weight, self.own_bias = _affine(model.get_submodule(embedder), family.backbone)
        self.bias = torch.zeros_like(self.weight.flatten(1)[:, 0]) if self.own_bias is None else self.own_bias

    def features(self, latents: Tensor) -> Tensor:
        """(B,C,h*p,w*p) -> (B,h,w,K), in the order in which the embedder's weight, flattened, takes them."""
        return self.family.patches(latents, self.p)

    @torch.no_grad()
    def offset(self, latents: Tensor) -> Tensor:
        """(1,h,w,D): the embedding when weight and bias are 0 (positional embeddings)."""
        kept = self.weight.clone(), self.bias.clone()
        self.weight.zero_()
        self.bias.zero_()
        try:
            return self.family.embed(self.model, torch.zeros_like(latents[:1]), self.config)
        finally:
            self.set(*kept)

    @torch.no_grad()
    def add_to(self, equations: NormalEquations, teacher: Tensor, latents: Tensor, resample: Resample) -> None:
        """Accumulate Eq. 1 for teacher embeddings (B,h,w,D) and student latents (B,C,h',w')."""
        target, features = resample_pair(teacher, self.features(latents), resample)
        _, offset = resample_pair(teacher[:1], self.offset(latents), resample)
        equations.add(features, target - offset)

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Write weight (D,K) and bias (D,), if it has one, into the embedder."""
        self.weight.copy_(weight.reshape(self.weight.shape))
        if self.own_bias is not None:
            self.own_bias.copy_(bias)

    def flat(self) -> tuple[Tensor, Tensor]:
        """(weight (D,K), bias (D,)) as they are."""
        return self.weight.detach().flatten(1), self.bias.detach()


def _affine(embedder: nn.Module, backbone: Backbone) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an embedder that is one layer; the bias is None where the family's has none."""
    layers = [m for m in embedder.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if len(layers) != 1 or (layers[0].bias is not None) != backbone.end_bias:
        kind = "with bias" if backbone.end_bias else "without bias"
        raise ValueError(
            f"the embedder of {backbone.title} is not one Linear or Conv2d {kind}: the closed form does not apply, "
            "use solver: adamw"
        )
    return layers[0].weight, layers[0].bias

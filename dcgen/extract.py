# r rank
"""Extracts an adapter from a merged model and its base: every changed Linear is factored by SVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, LoraPair
from .backbones.keymap import describe_keys
from .latent import LatentSpace
from .precision import with_float64
from .release import Model

Progress = Callable[[int, int, str], None]
# Of the randomised SVD (Halko et al., arXiv:0909.4061): directions beyond the rank, and passes over the matrix.
OVERSAMPLING, PASSES = 16, 4


@dataclass(frozen=True)
class FactoredLayer:
    """Result for one layer: its rank, and the share of ||W' - W||^2 that the stored factors reproduce."""

    path: str
    rank: int
    energy: float


def extract(
    merged: Model,
    base: Model,
    *,
    rank: int = 256,
    energy: float = 1.0,
    latent: LatentSpace | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[Adapter, list[FactoredLayer]]:
    """(adapter, result for each factored layer) such that base + adapter is the merged model.

    rank: the maximum of a layer; energy in (0,1]: each layer uses the smallest rank that keeps this share, 1 = all
    singular values above the rounding of the stored weights, which is exact for a merged LoRA. dtype: of the factors,
    None = the merged weights'. latent: required when the merged model does not name its own. ValueError when the two
    architectures differ, or when a tensor changed that an adapter cannot carry (a bias, a norm inside a block).
    """
    space = latent or merged.latent
    if space is None:
        raise ValueError(f"{merged.tensors.path} does not say which autoencoder it belongs to: name it (latent)")
    if rank < 1 or not 0 < energy <= 1:
        raise ValueError(f"rank must be at least 1 and energy in (0, 1], got {rank} and {energy}")
    model, signature = merged.backbone, merged.signature
    size = model.patch_size(merged.config, space, str(merged.tensors.path))
    if base.backbone is not model:
        raise ValueError(f"{base.tensors.path} is a {base.backbone.name} model, the merged one {model.name}")
    schedule = merged.schedule or model.default_schedule(space, merged.config)
    adapter = Adapter(model.name, {}, {}, space, signature, schedule, size)
    adapter.check_base(base.signature, str(base.tensors.path))
    adapter = replace(adapter, base_weights=base.identity(), base_latent=base.latent)
    ends, extras = model.latent_shapes(signature, space.channels, size), model.extra_shapes(signature)
    linears, base_entries = model.linears(signature), base.entries
    layers: list[FactoredLayer] = []
    unsupported: list[str] = []
    for step, (key, entry) in enumerate(merged.entries.items()):
        if progress:
            progress(step, len(merged.entries), key)
        weight = merged.get(key)
        if key in ends:
            adapter.tensors[key] = weight
            continue
        if entry.shape != base_entries[key].shape:
            raise ValueError(f"{key} is {entry.shape} in the merged model, {base_entries[key].shape} in the base")
        delta = weight.to(device, torch.float32) - base.get(key).to(device, torch.float32)
        if not delta.any():
            continue
        path = key.removesuffix(".weight")
        if key in extras:
            adapter.tensors[key] = weight
        elif key.endswith(".weight") and path in linears:
            floor = rounding_floor(weight.flatten(1), (entry.dtype, base_entries[key].dtype))
            pair, share = factor(delta.flatten(1), rank, energy, dtype or entry.dtype, floor)
            adapter.lora[path] = pair.shaped(entry.shape)
            layers.append(FactoredLayer(path, pair.rank, share))
        else:
            unsupported.append(key)
    if unsupported:
        raise ValueError(
            f"changed tensors that an adapter cannot carry: {describe_keys([], unsupported)}; keep the merged file"
        )
    adapter.metadata = {
        "dcgen.extracted_from": merged.tensors.path.name,
        "dcgen.extracted_base": base.tensors.path.name,
    }
    return adapter, layers


def factor(
    delta: Tensor, rank: int, energy: float = 1.0, dtype: torch.dtype | None = None, floor: float = 0.0
) -> tuple[LoraPair, float]:
    """(pair, share of ||delta||^2 kept) of a change (out,in), not all zero; alpha = rank, so delta ~ B @ A.

    Singular values up to `floor` are dropped as noise. The share is measured with the factors as stored, including
    rounding.
    """
    delta = with_float64(delta)
    U, S, V = leading_svd(delta, rank)
    total = delta.double().square().sum()
    # The error of float arithmetic, bounded as in numpy's matrix_rank.
    limit = max(floor, float(S[0]) * max(delta.shape) * torch.finfo(delta.dtype).eps)
    numerical = int((limit < S).sum())
    required = int((S.double().square().cumsum(0) < energy * total).sum()) + 1 if energy < 1 else numerical
    r = max(1, min(rank, numerical, required))
    root = S[:r].sqrt()
    pair = LoraPair((root[:, None] * V[:, :r].T).cpu().to(dtype), (U[:, :r] * root).cpu().to(dtype), float(r))
    residual = (delta.cpu() - pair.delta()).double().square().sum()
    return pair, float(1 - residual / total.cpu())


def rounding_floor(weight: Tensor, stored: Iterable[torch.dtype]) -> float:
    """Largest singular value to expect in a change from rounding a weight (out,in) to its stored dtypes.

    Rounding moves an entry by up to half an ulp, evenly: rms u/sqrt(3) of its size, u the unit roundoff. Independent
    entries of such rms b have singular values up to the largest row norm plus the largest column norm of b (Bandeira
    and van Handel, arXiv:1408.6185).
    """
    roundoff = max(torch.finfo(dtype).eps for dtype in stored) / 2
    squares = weight.float().square()
    norms = squares.sum(dim=0).max().sqrt() + squares.sum(dim=1).max().sqrt()
    return roundoff / math.sqrt(3) * float(norms)


def leading_svd(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of a matrix: in full when that is cheap, else the first rank + OVERSAMPLING directions."""
    width = min(delta.shape)
    if rank + OVERSAMPLING >= width // 4:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        return U, S, Vh.T
    with torch.random.fork_rng(devices=[delta.device] if delta.device.type == "cuda" else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(delta, q=rank + OVERSAMPLING, niter=PASSES)

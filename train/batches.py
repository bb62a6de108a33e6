"""Batches as a pure function of (seed, step, slot): resuming needs one integer, whatever the number of ranks."""
# B samples in this micro-batch

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from train.conditioning import Cond, replace_rows


@dataclass(frozen=True)
class Batch:
    """A micro-batch: which samples, and their own random numbers.

    `slots` are positions in the global batch, so the numbers of a sample do not depend on ranks or accumulation.
    """

    seed: int
    step: int
    slots: tuple[int, ...]
    indices: tuple[int, ...]
    device: torch.device

    def __len__(self) -> int:
        return len(self.slots)

    def generator(self, position: int, purpose: str) -> torch.Generator:
        """CPU generator of one sample and purpose ("noise", "time", ...)."""
        return torch.Generator().manual_seed(_mix(self.seed, self.step, self.slots[position], purpose))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) standard normal, float32 on the batch's device."""
        return self._draw(purpose, lambda g: torch.randn(tuple(shape), generator=g))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) uniform in [0, 1), float32 on the batch's device."""
        return self._draw(purpose, lambda g: torch.rand(tuple(shape), generator=g))

    def integers(self, purpose: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) integers in [0, high), int64 on the batch's device."""
        return self._draw(purpose, lambda g: torch.randint(high, tuple(shape), generator=g))

    def _draw(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        rows = [draw(self.generator(position, purpose)) for position in range(len(self))]
        return torch.stack(rows).to(self.device)


def drop_captions(batch: Batch, cond: Cond, empty: Cond, share: float) -> tuple[Cond, Tensor]:
    """(conditioning with the empty prompt's (1,...) in the dropped rows, which rows those are (B,))."""
    dropped = batch.uniform("drop") < share
    return replace_rows(cond, empty, dropped), dropped


def losses_by_caption(errors: Tensor, dropped: Tensor) -> dict[str, float | Tensor]:
    """What to log of errors (B,): the mean with a caption and without; NaN, which the log leaves out, for none."""
    errors = errors.detach()
    return {"loss_cond": errors[~dropped].mean(), "loss_uncond": errors[dropped].mean()}


class BatchPlan:
    """Which samples each step takes. An epoch visits every bucket in shuffled batches of one bucket each;
    a bucket's last batch is filled up from the start of the same shuffled bucket."""

    def __init__(self, buckets: Sequence[Sequence[int]], batch: int, seed: int) -> None:
        self.buckets = [tuple(bucket) for bucket in buckets if len(bucket)]
        if not self.buckets:
            raise ValueError("no samples to train on: every bucket is empty")
        self.batch = batch
        self.seed = seed
        self.steps_per_epoch = sum(-(-len(bucket) // batch) for bucket in self.buckets)
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def indices(self, step: int) -> tuple[int, ...]:
        """Sample numbers of all slots of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def _plan_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, 0, "epoch"))
        batches = []
        for bucket in self.buckets:
            order = torch.randperm(len(bucket), generator=generator).tolist()
            for start in range(0, len(bucket), self.batch):
                batches.append(tuple(bucket[order[(start + k) % len(order)]] for k in range(self.batch)))
        return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]

    def micro_batches(self, step: int, *, rank: int, world: int, accumulate: int, device: torch.device) -> list[Batch]:
        """The micro-batches of one rank for one step: rank r takes the r-th contiguous share of the slots."""
        indices = self.indices(step)
        share = self.batch // world
        size = share // accumulate
        starts = [rank * share + k * size for k in range(accumulate)]
        return [Batch(self.seed, step, tuple(range(s, s + size)), indices[s : s + size], device) for s in starts]


def _mix(seed: int, step: int, slot: int, purpose: str) -> int:
    """A 63-bit seed from four parts (splitmix64 over each in turn)."""
    state = 0
    for part in (seed, step, slot, zlib.crc32(purpose.encode())):
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1

"""What encoding and decoding take with a DC-AE of a given config, before one is loaded."""

# h w latent rows and columns

from __future__ import annotations

import functools

import torch

from .config import DCAEConfig
from .model import DCAE
from .plan import Chain, Strip


def peak_bytes(
    config: DCAEConfig, h: int, w: int, dtype: torch.dtype, strip: Strip, direction: str, batch: int = 1
) -> int:
    """Upper estimate of the activation memory of "encode" or "decode" at a latent size of h x w, in bytes.

    What it counts: Chain.peak_bytes.
    """
    return _chain(config, direction).peak_bytes(h, w, dtype, strip, batch)


def choose_strip(
    config: DCAEConfig,
    h: int,
    w: int,
    dtype: torch.dtype,
    free_bytes: int,
    direction: str,
    working_bytes: int | None = None,
) -> Strip:
    """The largest strip whose peak_bytes fits in 90% of free_bytes; see Chain.choose_strip."""
    return _chain(config, direction).choose_strip(h, w, dtype, free_bytes, working_bytes)


@functools.lru_cache(maxsize=32)
def _chain(config: DCAEConfig, direction: str) -> Chain:
    return DCAE(config, device="meta").chain(direction)

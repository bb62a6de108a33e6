"""Text conditioning of a release, as its own pipeline makes it."""

from __future__ import annotations

from pathlib import Path

import torch

from train.family import TextEncoder
from train.models import network_of


def load_text(
    base: str | Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
) -> TextEncoder:
    """A function from captions to the caption fields that the velocity of the base's family takes.

    tokens: length of the text; None = the release's own. Errors name the file of the release.
    """
    family, _ = network_of(base)
    return family.text_encoder(Path(base), device, dtype, tokens)

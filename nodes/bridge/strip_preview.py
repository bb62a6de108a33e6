# n image rows of a strip, H W image rows and columns
"""Preview of the finished part of an image while a DC-AE decodes it strip by strip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MAX_SIDE = 512  # pixels of the longer side


class StripPreview:
    """A small grey canvas that is filled from the top."""

    def __init__(self, height: int, width: int) -> None:
        self.height = height
        scale = min(1.0, MAX_SIDE / max(height, width))
        self.size = (max(1, round(height * scale)), max(1, round(width * scale)))
        self.restart()

    def restart(self) -> None:
        self.rows_done = 0
        self.canvas = torch.full((*self.size, 3), 128, dtype=torch.uint8)

    def add(self, rows: Tensor) -> tuple[str, Image.Image, int]:
        """Draw finished rows (1,3,n,W) in -1..1 below the earlier ones; returns a preview for ProgressBar."""
        top = self.rows_done * self.size[0] // self.height
        self.rows_done += rows.shape[2]
        bottom = self.rows_done * self.size[0] // self.height
        if bottom > top:
            small = F.interpolate(rows.float(), size=(bottom - top, self.size[1]), mode="nearest")
            pixels = (small[0].clamp(-1, 1) + 1) * 127.5
            self.canvas[top:bottom] = pixels.to(torch.uint8).movedim(0, -1).cpu()
        return ("JPEG", Image.fromarray(self.canvas.numpy()), MAX_SIDE)

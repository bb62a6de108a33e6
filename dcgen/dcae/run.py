"""The loops that send an image through a chain of DC-AE layers in chunks of rows, and report how far they are."""

# B batch, C channels, H W rows and columns at a layer's input

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .layers import Layer
from .plan import rows_at_a_time
from .stream import Chunks, Collector, regroup, source_rows

Progress = Callable[[int, int, "Tensor | None"], None]  # (work done, work in all, finished rows)

PROGRESS_TOTAL = 1000


class Meter:
    """Turns finished work of all layers into calls of progress(done, total, rows)."""

    def __init__(self, layers: Sequence[Layer], shape: torch.Size, images: int, progress: Progress | None) -> None:
        self.progress = progress
        self.done = self.total = 0.0  # multiply-adds
        size = float(shape[2] * shape[3])
        for layer in layers:
            self.total += layer.work * size * images
            size *= layer.scale**2

    def add(self, work: float) -> None:
        """Count work as done."""
        self.done += work
        self.update(None)

    def update(self, rows: Tensor | None) -> None:
        """Report the share of the work that is done; `rows`: finished rows of the result, if there are new ones."""
        if self.progress is not None:
            share = min(1.0, self.done / self.total)
            self.progress(int(share * PROGRESS_TOTAL), PROGRESS_TOTAL, rows)


class Metered(Iterator[Tensor]):
    """Chunks of a layer's input; the work on each counts as done once the layer asks for the next.

    Not a generator, so that the layer is the only owner of a chunk: see Handover.
    """

    def __init__(self, chunks: Chunks, layer: Layer, meter: Meter) -> None:
        self.chunks, self.layer, self.meter = chunks, layer, meter
        self.work = 0  # on the chunk that the layer has

    def __next__(self) -> Tensor:
        if self.work:
            self.meter.add(self.work)
            self.work = 0
        chunk = next(self.chunks)
        self.work = self.layer.work * chunk.shape[2] * chunk.shape[3]
        return chunk


def run(layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, limit: int, meter: Meter) -> Tensor:
    """The layers on x (B,C,H,W), each keeping at most about `limit` elements alive; x may be on another dtype."""
    out = Collector(_through(layers, x.shape[2]))
    for chunk in stream(layers, x, dtype, limit, meter):
        out.add(chunk)
        meter.update(chunk)
    return out.take()


def stream(layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, limit: int, meter: Meter) -> Chunks:
    """Chunks of rows of the result of the layers on x."""
    height, width = x.shape[2:]
    chunks = source_rows(x, dtype, rows_at_a_time(layers[0], height, width, limit))
    for layer in layers:
        chunks = regroup(chunks, rows_at_a_time(layer, height, width, limit))
        chunks = layer.stream(Metered(chunks, layer, meter), height, limit)
        height, width = layer.size(height), layer.size(width)
    return chunks


def run_panels(
    layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, limit: int, columns: int, meter: Meter
) -> Tensor:
    """Local layers on x, `columns` input columns at a time plus the columns around that they depend on."""
    height, width = x.shape[2:]
    halo, scale = 0, 1.0
    for layer in reversed(layers):
        halo = layer.halo(halo)
        scale *= layer.scale
    step = max(1, round(1 / scale))  # panels begin at a whole output column
    columns, halo = -(-columns // step) * step, -(-halo // step) * step
    out: Tensor | None = None
    for left in range(0, width, columns):
        right = min(width, left + columns)
        start, stop = max(0, left - halo), min(width, right + halo)
        row = 0
        for chunk in stream(layers, x[:, :, :, start:stop], dtype, limit, meter):
            rows = chunk[:, :, :, round((left - start) * scale) : round((right - start) * scale)]
            if out is None:
                shape = (x.shape[0], rows.shape[1], _through(layers, height), _through(layers, width))
                out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
            out[:, :, row : row + rows.shape[2], round(left * scale) : round(right * scale)] = rows
            row += rows.shape[2]
            del chunk, rows
            meter.update(None)
    assert out is not None
    return out


def _through(layers: Sequence[Layer], pixels: int) -> int:
    for layer in layers:
        pixels = layer.size(pixels)
    return pixels

"""How much of a picture each DC-AE layer works on at a time, what that costs, and the loop that does it."""

# B batch, C channels, H W rows and columns at a layer's input, h w latent rows and columns, f spatial factor

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DCAEConfig
from .layers import KEEP_SHARE, Layer
from .stream import Chunks, Collector, regroup, source_rows

OnStrip = Callable[[int, int, "Tensor | None"], None]  # (work done, work in all, finished rows)

INDEX_LIMIT = 2**31 - 1  # many kernels count elements in int32
PROGRESS_TOTAL = 1000
CPU_WORKING_BYTES = 256 << 20
MIN_COLUMNS = 8
MIN_STEP_ROWS = 2  # a downsampling layer needs two rows for one


class Strip(NamedTuple):
    """Latent rows at a time (None = whole picture) and latent columns at a time (None = all)."""

    rows: int | None
    columns: int | None = None


def budget(layers: Sequence[Layer], width: int, strip: int) -> int:
    """Elements that the most expensive layer keeps alive for `strip` latent rows; `width` is that of the first input.

    Cheaper layers (all low-resolution ones) get as many rows as fit the same amount.
    """
    costs = [layer.live * w * rows for layer, w, rows in _sizes(layers, width)]
    return min(INDEX_LIMIT // 2, max(int(cost * strip) for cost in costs))


def whole_budget(layers: Sequence[Layer], shape: torch.Size) -> int:
    """No limit, unless a tensor of the whole batch would pass the index limit of common kernels."""
    batch, _, height, width = shape
    largest, h = 0, float(height)
    for layer in layers:
        largest = max(largest, int(layer.live * h * (h * width / height)))
        h *= layer.scale
    return largest if batch * largest < INDEX_LIMIT else INDEX_LIMIT // (2 * batch)


def _sizes(layers: Sequence[Layer], width: int) -> list[tuple[Layer, int, float]]:
    """(layer, columns at its input, rows at its input per latent row) for a picture `width` wide at the first."""
    growth = [1.0]
    for layer in layers:
        growth.append(growth[-1] * layer.scale)
    latent = growth[-1] if growth[-1] < 1 else 1.0  # an encoder ends at the latent, a decoder begins there
    return [(layer, int(width * size), size / latent) for layer, size in zip(layers, growth, strict=False)]


class Meter:
    """Turns finished work of all layers into calls of on_strip(done, total, rows)."""

    def __init__(self, layers: Sequence[Layer], shape: torch.Size, pictures: int, on_strip: OnStrip | None) -> None:
        self.on_strip, self.done = on_strip, 0.0
        self.total = 0.0
        size = float(shape[2] * shape[3])
        for layer in layers:
            self.total += layer.work * size * pictures
            size *= layer.scale**2

    def add(self, work: float) -> None:
        """Count work as done."""
        self.done += work
        self.tell(None)

    def tell(self, rows: Tensor | None) -> None:
        if self.on_strip is not None:
            share = min(1.0, self.done / self.total)
            self.on_strip(int(share * PROGRESS_TOTAL), PROGRESS_TOTAL, rows)


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
        meter.tell(chunk)
    return out.take()


def stream(layers: Sequence[Layer], x: Tensor, dtype: torch.dtype, limit: int, meter: Meter) -> Chunks:
    """Chunks of rows of the result of the layers on x."""
    height, width = x.shape[2:]
    chunks = source_rows(x, dtype, _rows(layers[0], height, width, limit))
    for layer in layers:
        chunks = regroup(chunks, _rows(layer, height, width, limit))
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
            meter.tell(None)
    assert out is not None
    return out


def local_part(layers: Sequence[Layer], width: int, direction: str, factor: int) -> int:
    """Where the part begins (decode) or ends (encode) that runs in column panels.

    Panels compute the columns around them again, so they are worth it only where no layer attends globally and
    resolution is high: within 1/8 of the image size.
    """
    image = width * (factor if direction == "decode" else 1)
    deep = [index for index, (layer, w, _) in enumerate(_sizes(layers, width)) if layer.held or image > 8 * w]
    if direction == "decode":
        return deep[-1] + 1 if deep else 0
    return deep[0] if deep else len(layers)


def _rows(layer: Layer, height: int, width: int, limit: int) -> int:
    return max(MIN_STEP_ROWS, min(height, limit // (layer.live * width)))


def _through(layers: Sequence[Layer], pixels: int) -> int:
    for layer in layers:
        pixels = layer.size(pixels)
    return pixels


class Chain(NamedTuple):
    """The layers of "encode" or "decode" of one DC-AE, in order, and what they take. h, w: the size of the latent."""

    config: DCAEConfig
    direction: str
    layers: Sequence[Layer]

    def peak_bytes(self, h: int, w: int, dtype: torch.dtype, strip: Strip, batch: int = 1) -> int:
        """Upper estimate of the activation memory, in bytes.

        A picture runs from one attention layer to the next, since each needs all of its input before it yields
        anything. The estimate is the largest over these stretches of: held by the attention at either end (its whole
        input, its joined projection) + rows and folded kernels carried by the layers between + K * working set; plus
        the result in the last. The working set is `budget`, or what the layers of the stretch take for a whole picture
        if that is less. K = 2 (chunks of several layers wait while the deepest one works; measured up to 1.5), or 1
        for a whole picture. Weights, the input and a kernel's scratch space are not in it.
        """
        factor = self.config.spatial_factor
        height, width = (h * factor, w * factor) if self.direction == "encode" else (h, w)
        result = 3 * h * w * factor**2 if self.direction == "decode" else self.config.latent_channels * h * w
        part = width if strip.columns is None else min(width, strip.columns * width // w)
        if strip.rows is None:
            limit = whole_budget(self.layers, torch.Size((1, 3, height, width)))
        else:
            limit = budget(self.layers, part, strip.rows)
        cut = None if strip.columns is None else local_part(self.layers, width, self.direction, factor)
        places = []
        for index, (layer, columns, _) in enumerate(_sizes(self.layers, width)):
            panels = cut is not None and (index >= cut if self.direction == "decode" else index < cut)
            in_panel = columns * part // width if panels else columns
            places.append(Place(layer, columns, columns * height // width, in_panel))
        middle = places[cut].pixels * places[cut].layer.channels if cut and cut < len(places) else 0
        # a picture beyond the index limit is worked on in strips even if none are asked for
        whole = strip.rows is None and limit >= max(place.layer.live * place.pixels for place in places)
        peak = 0
        for stretch in _stretches(places):
            working = min(limit, max(place.layer.live * place.pixels for place in stretch))
            held = sum(place.held(limit) for place in (stretch[0], stretch[-1]))
            carried = 0 if whole else sum(place.layer.carried * place.part for place in stretch)
            fixed = sum(place.layer.fixed for place in stretch if not place.layer.held)
            last = result if stretch[-1] is places[-1] else 0
            peak = max(peak, last + held + fixed + carried + (working if whole else 2 * working))
        # pictures that are worked on one by one share all but the results
        return dtype.itemsize * (batch * peak if whole else peak + middle + (batch - 1) * result)

    def choose_strip(
        self, h: int, w: int, dtype: torch.dtype, free_bytes: int, working_bytes: int | None = None
    ) -> Strip:
        """The largest strip (latent rows, columns) whose peak_bytes fits in 90% of free_bytes.

        working_bytes also bounds the working set: on a CPU small strips are faster because they stay in its caches.
        When nothing fits, the smallest strip there is: then the caller runs out of memory, or just gets by.
        """
        room = int(0.9 * free_bytes)
        width = w * self.config.spatial_factor if self.direction == "encode" else w
        unit = budget(self.layers, width, 1) * dtype.itemsize
        most = h if working_bytes is None else max(1, min(h, working_bytes // unit))
        if most == h and self.peak_bytes(h, w, dtype, Strip(None)) <= room:
            return Strip(None)
        if self.peak_bytes(h, w, dtype, Strip(1)) <= room:
            low = 1
            while low < most:  # bisection: more rows never take less memory
                middle = (low + most + 1) // 2
                if self.peak_bytes(h, w, dtype, Strip(middle)) <= room:
                    low = middle
                else:
                    most = middle - 1
            return Strip(low)
        columns = w
        while columns > MIN_COLUMNS:
            columns = max(MIN_COLUMNS, columns // 2)
            if self.peak_bytes(h, w, dtype, Strip(1, columns)) <= room:
                break
        return Strip(1, columns) if columns < w else Strip(1)


class Place(NamedTuple):
    """A layer and the size of its input; `part` columns of it are worked on at a time."""

    layer: Layer
    columns: int
    rows: int
    part: int

    @property
    def pixels(self) -> int:
        return self.columns * self.rows

    def held(self, limit: int) -> int:
        """Elements that an attention layer holds of the whole picture; `kept` ones only while they are few."""
        layer = self.layer
        kept = layer.kept * self.pixels
        return layer.fixed + layer.held * self.pixels + kept * (kept <= limit // KEEP_SHARE) if layer.held else 0


def _stretches(places: Sequence[Place]) -> list[Sequence[Place]]:
    """Cut at attention layers; such a layer ends one stretch and begins the next."""
    cuts = [0, *(index for index, place in enumerate(places) if place.layer.held), len(places) - 1]
    return [places[first : last + 1] for first, last in itertools.pairwise(cuts) if last > first]


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration):  # what Linux could free for us, not only what lies idle
        with open("/proc/meminfo", encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30

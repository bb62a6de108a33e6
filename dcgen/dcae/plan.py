"""How much of an image each DC-AE layer works on at a time, and the memory that this takes."""

# C channels, H W rows and columns at a layer's input, h w latent rows and columns, f spatial factor

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .config import DCAEConfig
from .layers import KEEP_SHARE, Layer

INDEX_LIMIT = 2**31 - 1  # many kernels count elements in int32
CPU_WORKING_BYTES = 256 << 20  # small working sets are faster there: more of them is in its caches
MIN_COLUMNS = 8
MIN_STEP_ROWS = 2  # a downsampling layer needs two rows for one


class Strip(NamedTuple):
    """Latent rows at a time (None = whole image) and latent columns at a time (None = all)."""

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
    """(layer, columns at its input, rows at its input per latent row) for an image `width` wide at the first."""
    growth = [1.0]
    for layer in layers:
        growth.append(growth[-1] * layer.scale)
    latent = growth[-1] if growth[-1] < 1 else 1.0  # an encoder ends at the latent, a decoder begins there
    return [(layer, int(width * size), size / latent) for layer, size in zip(layers, growth, strict=False)]


def rows_at_a_time(layer: Layer, height: int, width: int, limit: int) -> int:
    """Input rows of a layer whose work on them keeps at most `limit` elements alive, but no fewer than it needs."""
    return max(MIN_STEP_ROWS, min(height, limit // (layer.live * width)))


class Chain(NamedTuple):
    """The layers of "encode" or "decode" of one DC-AE, in order, and what they take. h, w: the size of the latent."""

    config: DCAEConfig
    direction: str
    layers: Sequence[Layer]

    def local_part(self, width: int) -> int:
        """Index of the layer where the part begins (decode) or ends (encode) that runs in column panels.

        width: of the first input. Panels compute the columns around them again, so they are worth it only where no
        layer attends globally and resolution is high: within 1/8 of the image size.
        """
        image = width * (self.config.spatial_factor if self.direction == "decode" else 1)
        deep = [i for i, (layer, w, _) in enumerate(_sizes(self.layers, width)) if layer.held or image > 8 * w]
        if self.direction == "decode":
            return deep[-1] + 1 if deep else 0
        return deep[0] if deep else len(self.layers)

    def peak_bytes(self, h: int, w: int, dtype: torch.dtype, strip: Strip, batch: int = 1) -> int:
        """Upper estimate of the activation memory, in bytes.

        An image runs from one attention layer to the next, since each needs all of its input before it yields
        anything. The estimate is the largest over these segments of: held by the attention at either end (its whole
        input, its joined projection) + rows and folded kernels carried by the layers between + K * working set; plus
        the result in the last. The working set is `budget`, or what the layers of the segment take for a whole image
        if that is less. K = 2 (chunks of several layers wait while the deepest one works; measured up to 1.5), or 1
        for a whole image. Weights, the input and a kernel's scratch space are not in it.
        """
        factor = self.config.spatial_factor
        height, width = (h * factor, w * factor) if self.direction == "encode" else (h, w)
        result = 3 * h * w * factor**2 if self.direction == "decode" else self.config.latent_channels * h * w
        part = width if strip.columns is None else min(width, strip.columns * width // w)
        if strip.rows is None:
            limit = whole_budget(self.layers, torch.Size((1, 3, height, width)))
        else:
            limit = budget(self.layers, part, strip.rows)
        cut = None if strip.columns is None else self.local_part(width)
        inputs = self._inputs(height, width, part, cut)
        middle = inputs[cut].pixels * inputs[cut].layer.channels if cut and cut < len(inputs) else 0
        # an image beyond the index limit is worked on in strips even if none are asked for
        whole = strip.rows is None and limit >= max(item.layer.live * item.pixels for item in inputs)
        peak = 0
        for segment in _segments(inputs):
            working = min(limit, max(item.layer.live * item.pixels for item in segment))
            held = sum(item.held(limit) for item in (segment[0], segment[-1]))
            carried = 0 if whole else sum(item.layer.carried * item.part for item in segment)
            fixed = sum(item.layer.fixed for item in segment if not item.layer.held)
            last = result if segment[-1] is inputs[-1] else 0
            peak = max(peak, last + held + fixed + carried + (working if whole else 2 * working))
        # images that are worked on one by one share all but the results
        return dtype.itemsize * (batch * peak if whole else peak + middle + (batch - 1) * result)

    def _inputs(self, height: int, width: int, part: int, cut: int | None) -> list[LayerInput]:
        """The layers with the sizes of their inputs; `part` columns of the first at a time on one side of `cut`."""
        inputs = []
        for index, (layer, columns, _) in enumerate(_sizes(self.layers, width)):
            panels = cut is not None and (index >= cut if self.direction == "decode" else index < cut)
            in_panel = columns * part // width if panels else columns
            inputs.append(LayerInput(layer, columns, columns * height // width, in_panel))
        return inputs

    def choose_strip(
        self, h: int, w: int, dtype: torch.dtype, free_bytes: int, working_bytes: int | None = None
    ) -> Strip:
        """The largest strip (latent rows, columns) whose peak_bytes fits in 90% of free_bytes.

        working_bytes also bounds the working set: on a CPU small strips are faster because they stay in its caches.
        When nothing fits, the smallest strip there is: then the caller runs out of memory, or just gets by.
        """
        available = int(0.9 * free_bytes)
        width = w * self.config.spatial_factor if self.direction == "encode" else w
        unit = budget(self.layers, width, 1) * dtype.itemsize
        upper = h if working_bytes is None else max(1, min(h, working_bytes // unit))
        if upper == h and self.peak_bytes(h, w, dtype, Strip(None)) <= available:
            return Strip(None)
        if self.peak_bytes(h, w, dtype, Strip(1)) <= available:
            lower = 1
            while lower < upper:  # bisection: more rows never take less memory
                middle = (lower + upper + 1) // 2
                if self.peak_bytes(h, w, dtype, Strip(middle)) <= available:
                    lower = middle
                else:
                    upper = middle - 1
            return Strip(lower)
        columns = w
        while columns > MIN_COLUMNS:
            columns = max(MIN_COLUMNS, columns // 2)
            if self.peak_bytes(h, w, dtype, Strip(1, columns)) <= available:
                break
        return Strip(1, columns) if columns < w else Strip(1)


class LayerInput(NamedTuple):
    """A layer and the size of its input; `part` columns of it are worked on at a time."""

    layer: Layer
    columns: int
    rows: int
    part: int

    @property
    def pixels(self) -> int:
        return self.columns * self.rows

    def held(self, limit: int) -> int:
        """Elements that an attention layer holds of the whole image; `kept` ones only while they are few."""
        layer = self.layer
        kept = layer.kept * self.pixels
        return layer.fixed + layer.held * self.pixels + kept * (kept <= limit // KEEP_SHARE) if layer.held else 0


def _segments(inputs: Sequence[LayerInput]) -> list[Sequence[LayerInput]]:
    """Cut at attention layers; such a layer ends one segment and begins the next."""
    cuts = [0, *(index for index, item in enumerate(inputs) if item.layer.held), len(inputs) - 1]
    return [inputs[first : last + 1] for first, last in itertools.pairwise(cuts) if last > first]


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now."""
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        return int(backend.mem_get_info(device)[0])
    if device.type == "mps":  # what the system recommends to use at most, less what this process has
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    with contextlib.suppress(OSError, StopIteration):  # what Linux could free for us, not only what lies idle
        with open("/proc/meminfo", encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30

"""Images as streams of row chunks: what is kept between chunks, and how chunks are cut and joined."""

# B batch, C channels, H W rows and columns at the layer's own resolution

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
Chunks = Iterator[Tensor]  # (B, C, rows, W) pieces of one image, top to bottom


# Most rows that a Window puts before a chunk (halving the size), and after the last one.
HEAD, TAIL = 3, 1
_BUFFER = "_dcgen_buffer"  # of a chunk with rows to spare: (the tensor it is a part of, the number of its first row)


def with_spare_rows(shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """An empty chunk in memory with HEAD rows before it and TAIL after it, which a Window fills instead of copying.

    Only for one image: those of a batch would not lie one behind the other. dtype and device are those of `like`.
    """
    batch, channels, rows, columns = shape
    extra = HEAD + TAIL if batch == 1 else 0
    buffer = torch.empty(
        (batch, channels, rows + extra, columns),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
    return _part(buffer, HEAD, rows) if extra else buffer


def _part(buffer: Tensor, start: int, rows: int) -> Tensor:
    """Rows of a buffer, which know that they are."""
    chunk = buffer[:, :, start : start + rows]
    setattr(chunk, _BUFFER, (buffer, start))
    return chunk


def has_spare_rows(chunk: Tensor) -> bool:
    """Whether `chunk` is one of with_spare_rows, or a part of one that `regroup` cut."""
    return hasattr(chunk, _BUFFER)


class Window:
    """The rows that a k-row operator needs from the chunks before, and the zero rows outside of the image.

    ``span`` rows in give one step of output, each step moves ``step`` rows down; ``top`` / ``bottom`` zero rows pad
    the image. Calling it with a chunk returns all rows that complete steps need, or None when there are too few.
    Where a chunk has spare rows, they take the other rows and nothing is copied.
    """

    def __init__(self, span: int, step: int, top: int, bottom: int) -> None:
        self.span, self.step, self.top, self.bottom = span, step, top, bottom
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor | None:
        joined = self._joined(x, self.bottom if last else 0)
        steps = (joined.shape[2] - self.span) // self.step + 1
        if steps <= 0:
            self.kept = joined
            return None
        if not last:
            self.kept = joined[:, :, steps * self.step :].clone()
        return joined[:, :, : (steps - 1) * self.step + self.span]

    def _joined(self, x: Tensor, after: int) -> Tensor:
        """The kept rows or the zeros at the top, x, and `after` rows of zeros."""
        before = self.top if self.kept is None else self.kept.shape[2]
        buffer, start = getattr(x, _BUFFER, (x, 0))
        stop = start + x.shape[2]
        if before <= start and stop + after <= buffer.shape[2]:
            return self._filled(buffer[:, :, start - before : stop + after], before, after)
        parts = [x]
        if self.kept is not None:
            parts.insert(0, self.kept)
        elif self.top:
            parts.insert(0, self._zeros(x, self.top))
        if after:
            parts.append(self._zeros(x, after))
        return torch.cat(parts, 2) if len(parts) > 1 else x

    def _filled(self, joined: Tensor, before: int, after: int) -> Tensor:
        """A chunk and the rows around it in one memory. Before a part of a chunk these are the rows kept from it."""
        if before:
            edge = joined[:, :, :before]
            edge.zero_() if self.kept is None else edge.copy_(self.kept)
        if after:
            joined[:, :, joined.shape[2] - after :].zero_()
        return joined

    @staticmethod
    def _zeros(x: Tensor, rows: int) -> Tensor:
        # torch.cat keeps channels_last only if every part has it
        zeros = x.new_zeros(x.shape[0], x.shape[1], rows, x.shape[3])
        return zeros.contiguous(memory_format=torch.channels_last)


class Handover(Iterator[Result]):
    """function(item) of each item, without the Nones; the consumer becomes the only owner of a result.

    A generator that waits at `yield x` still holds x by its name. In a chain of generators every layer's last chunk
    would then stay in memory while the layers after it work. A function that has returned holds nothing.
    """

    def __init__(self, function: Callable[[Item], Result | None], items: Iterable[Item]) -> None:
        self._results = map(function, items)

    def __next__(self) -> Result:
        while True:
            result = next(self._results)
            if result is not None:
                return result


def in_rows(chunks: Iterable[Tensor], height: int) -> Iterator[tuple[Tensor, bool]]:
    """Pair every chunk with whether it ends the image of `height` rows."""
    seen = 0

    def paired(chunk: Tensor) -> tuple[Tensor, bool]:
        nonlocal seen
        seen += chunk.shape[2]
        return chunk, seen == height

    return map(paired, chunks)


def regroup(chunks: Chunks, rows: int) -> Chunks:
    """Cut chunks of more than `rows` rows evenly, join those of less than half; hold nothing back otherwise."""
    held: list[Tensor] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += chunk.shape[2]
        del chunk  # the consumer is to be its only owner: see Handover
        if count * 2 >= rows:
            yield from drain(_cut(held, rows))
            count = 0
    if held:
        yield from drain(_cut(held, rows))


def _cut(held: list[Tensor], rows: int) -> list[Tensor]:
    """The rows of `held` (emptied) in equal parts of at most `rows`."""
    joined = held[0] if len(held) == 1 else torch.cat(held, 2)
    held.clear()
    count = joined.shape[2]
    if count <= rows:
        return [joined]
    part = math.ceil(count / math.ceil(count / rows))
    starts = range(0, count, part)
    if not has_spare_rows(joined):
        return [joined[:, :, start : start + part] for start in starts]
    buffer, first = getattr(joined, _BUFFER)
    return [_part(buffer, first + start, min(part, count - start)) for start in starts]


def drain(items: list[Item]) -> Iterator[Item]:
    """The items first to last, each forgotten (`items` ends up empty) once it is handed over; see Handover."""
    items.reverse()
    while items:
        yield items.pop()


class Collector:
    """Put the chunks of an image of `height` rows back together, in one buffer unless autograd is watching."""

    def __init__(self, height: int) -> None:
        self.height, self.filled = height, 0
        self.parts: list[Tensor] = []
        self.whole: Tensor | None = None

    def add(self, chunk: Tensor) -> None:
        rows = chunk.shape[2]
        if rows == self.height:
            self.whole = chunk
        elif chunk.requires_grad:
            self.parts.append(chunk)
        else:
            if self.whole is None:
                shape = (chunk.shape[0], chunk.shape[1], self.height, chunk.shape[3])
                self.whole = torch.empty(
                    shape, dtype=chunk.dtype, device=chunk.device, memory_format=torch.channels_last
                )
            self.whole[:, :, self.filled : self.filled + rows] = chunk
        self.filled += rows

    def take(self) -> Tensor:
        """The whole image; the collector no longer holds it."""
        if self.filled != self.height:
            raise RuntimeError(f"DC-AE stream ended after {self.filled} of {self.height} rows")
        whole = torch.cat(self.parts, 2) if self.parts else self.whole
        self.parts, self.whole = [], None
        assert whole is not None
        return whole


def batched(images: Iterator[Tensor], count: int) -> Tensor:
    """`count` images (1,C,H,W) as one batch, each written into it when it is there unless autograd is watching."""
    out: Tensor | None = None
    parts = []
    for index, image in enumerate(images):
        if image.requires_grad:
            parts.append(image)
            continue
        if out is None:
            out = torch.empty_like(image.expand(count, -1, -1, -1), memory_format=torch.channels_last)
        out[index] = image[0]
    return torch.cat(parts) if out is None else out


def source_rows(x: Tensor, dtype: torch.dtype, rows: int) -> Chunks:
    """x (B,C,H,W) in chunks of rows, in the dtype and memory layout that the layers want."""
    for piece in x.split(rows, 2):
        yield piece.to(dtype).contiguous(memory_format=torch.channels_last)

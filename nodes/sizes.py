"""Image sizes that the published DC-Gen FLUX models were trained for, as choices of a node."""

from __future__ import annotations

import logging

CUSTOM = "width x height"

# (width, height), square first, then landscape by aspect ratio; portrait sizes swap the two. 1K and 4K are the
# aspect-ratio buckets of the official pipelines; 2K has none there and uses twice those of 1K.
LANDSCAPE: dict[str, tuple[tuple[int, int], ...]] = {
    "1K": ((1024, 1024), (1152, 896), (1152, 832), (1344, 768), (1728, 576)),
    "2K": ((2048, 2048), (2304, 1792), (2304, 1664), (2688, 1536), (3456, 1152)),
    "4K": ((4096, 4096), (4608, 3584), (4608, 3328), (5376, 3072)),
}


def _choices() -> dict[str, tuple[int, int]]:
    choices = {}
    for name, sizes in LANDSCAPE.items():
        for width, height in sizes:
            for w, h in dict.fromkeys(((width, height), (height, width))):
                choices[f"{name}: {w} x {h}"] = (w, h)
    return choices


SIZES = _choices()
LARGEST = "4K: 4096 x 4096"


def size_of(size: str, width: int, height: int) -> tuple[int, int]:
    """(width, height) of a choice; CUSTOM uses the given numbers. ValueError for an unknown choice."""
    if size == CUSTOM:
        return width, height
    if size not in SIZES:
        raise ValueError(f"`size` is {size!r}; choose {CUSTOM!r} or one of {', '.join(SIZES)}")
    return SIZES[size]


def size_or_default(size: str | None, width: int | None, height: int | None) -> tuple[int, int]:
    """(width, height) for a graph from a script, which may omit any of the three; the page always sends all.

    A width or a height alone gives a square. Without any of them the page's default is used, and logged.
    """
    if size is None and width is None and height is None:
        logging.info("Sampler 4K (DC-Gen): no latent and no size were given; it makes %s", LARGEST)
        return SIZES[LARGEST]
    side = width or height or 1024
    return size_of(size or CUSTOM, width or side, height or side)

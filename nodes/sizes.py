"""Image sizes that the published DC-Gen FLUX models were made for, as choices of a node."""

from __future__ import annotations

import logging

CUSTOM = "width x height"

# (width, height), square first, then landscape by aspect ratio; portraits are the same turned. 1K and 4K are the
# aspect-ratio buckets of the official pipelines; 2K has none of its own and takes 1K's, doubled.
LANDSCAPE: dict[str, tuple[tuple[int, int], ...]] = {
    "1K": ((1024, 1024), (1152, 896), (1152, 832), (1344, 768), (1728, 576)),
    "2K": ((2048, 2048), (2304, 1792), (2304, 1664), (2688, 1536), (3456, 1152)),
    "4K": ((4096, 4096), (4608, 3584), (4608, 3328), (5376, 3072)),
}


def _choices() -> dict[str, tuple[int, int]]:
    found = {}
    for name, sizes in LANDSCAPE.items():
        for width, height in sizes:
            for w, h in dict.fromkeys(((width, height), (height, width))):
                found[f"{name}: {w} x {h}"] = (w, h)
    return found


SIZES = _choices()
LARGEST = "4K: 4096 x 4096"


def chosen(size: str, width: int, height: int) -> tuple[int, int]:
    """(width, height) of a choice; CUSTOM takes the numbers given. ValueError for a choice that there is not."""
    if size == CUSTOM:
        return width, height
    if size not in SIZES:
        raise ValueError(f"`size` is {size!r}; choose {CUSTOM!r} or one of {', '.join(SIZES)}")
    return SIZES[size]


def posted(size: str | None, width: int | None, height: int | None) -> tuple[int, int]:
    """(width, height) of a posted graph that may leave any of the three out; the page sends them all.

    A width or a height alone is meant, and the other side is as long. Nothing at all is the page's default, said aloud.
    """
    if size is None and width is None and height is None:
        logging.info("Sampler 4K (DC-Gen): no latent and no size were given; it makes %s", LARGEST)
        return SIZES[LARGEST]
    side = width or height or 1024
    return chosen(size or CUSTOM, width or side, height or side)

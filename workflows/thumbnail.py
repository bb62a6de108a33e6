"""Thumbnails of the templates whose weights do not ship with the pack: what goes in, what it costs, what comes out.

    python workflows/thumbnail.py [NAME ...]

draws NAME.jpg for the template browser. A screenshot of the graph says little at that size, and shows missing models.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SIZE, FINER = (640, 400), 3  # drawn larger, then made smaller
PAPER, INK, GREY, ACCENT, FAINT = "#f6f3ec", "#22303c", "#7b8791", "#2f6f9f", "#d9e4ec"
SKY, SUN, HILLS = ("#fbd7a4", "#7fb2d6"), "#fff4d0", ("#5d7f6a", "#3f5f50")


@dataclass(frozen=True)
class Card:
    """What a template does. tokens: of one image at `pixels`; base: those of the model before DC-Gen, 0 for none."""

    title: str
    model: str
    pixels: int
    tokens: int
    base: int = 0
    given: tuple[str, ...] = ("prompt",)
    detail: str = ""


FLUX, KLEIN, Z_IMAGE, SANA = "FLUX.1 Krea", "FLUX.2 klein 4B", "Z-Image-Turbo", "SANA 1.6B"
CARDS = {
    "dcgen_flux_1k": Card("FLUX 1K", FLUX, 1024, 1024, 4096),
    "dcgen_flux_2k": Card("FLUX 2K", FLUX, 2048, 1024, 16384),
    "dcgen_flux_4k": Card("FLUX 4K", FLUX, 4096, 4096, 65536),
    "dcgen_flux_4k_adapter": Card(
        "FLUX 4K from your own FLUX", FLUX, 4096, 4096, 65536, detail="adapter on any loader"
    ),
    "dcgen_flux_4k_img2img": Card("FLUX 4K from an image", FLUX, 4096, 4096, 65536, ("image", "prompt")),
    "dcgen_flux_1k_to_4k_refine": Card("FLUX 1K, refined to 4K", FLUX, 4096, 4096, 65536, detail="first 1K, then 4K"),
    "dcgen_flux_inpaint": Card("FLUX inpainting", FLUX, 1024, 1024, 4096, ("image", "mask", "prompt")),
    "dcgen_flux_side_by_side": Card("FLUX: base beside DC-Gen", FLUX, 1024, 1024, 4096, detail="both, same seed"),
    "dcgen_flux_4k_4bit": Card("FLUX 4K in 4 or 8 bits", FLUX, 4096, 4096, 65536, detail="one quantized file"),
    "dcgen_flux_4k_nunchaku": Card("FLUX 4K with nunchaku", FLUX, 4096, 4096, 65536, detail="4-bit blocks, adapter"),
    "dcgen_klein_1k": Card("FLUX.2 klein 1K", KLEIN, 1024, 1024, 4096, detail="4 steps"),
    "dcgen_klein_4k": Card("FLUX.2 klein 4K", KLEIN, 4096, 4096, 65536, detail="4 steps"),
    "dcgen_zimage_1k": Card("Z-Image 1K", Z_IMAGE, 1024, 1024, 4096, detail="9 steps"),
    "dcgen_zimage_4k": Card("Z-Image 4K", Z_IMAGE, 4096, 4096, 65536, detail="9 steps"),
    "sana_1k": Card("SANA 1K", SANA, 1024, 1024),
    "sana_2k": Card("SANA 2K", SANA, 2048, 4096),
    "sana_4k": Card("SANA 4K", SANA, 4096, 16384),
    "sana_sprint_1k": Card("SANA-Sprint 1K", "SANA-Sprint 1.6B", 1024, 1024, detail="1 or 2 steps"),
    "dcgen_sana_1k": Card("DC-Gen-SANA 1K", SANA, 1024, 256, 1024, detail="adapter"),
    "dcgen_sana_4k": Card("DC-Gen-SANA 4K", SANA, 4096, 4096, 16384),
}


def thumbnail(card: Card) -> Image.Image:
    """The card as an image of SIZE."""
    image = Image.new("RGB", (SIZE[0] * FINER, SIZE[1] * FINER), PAPER)
    pen = Pen(ImageDraw.Draw(image))
    pen.text((32, 26), card.title, 34, INK)
    pen.text((32, 70), card.model + (f", {card.detail}" if card.detail else ""), 20, GREY)
    _inputs(pen, card.given)
    pen.arrow(168, 226, 214)
    _tokens(pen, card)
    pen.arrow(408, 226, 454)
    _picture(image, pen, (464, 142, 610, 288))
    pen.text((537, 300), f"{card.pixels} x {card.pixels}", 22, INK, middle=True)
    return image.resize(SIZE, Image.Resampling.LANCZOS)


class Pen:
    """Draws in the thumbnail's own pixels."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def text(self, place: tuple[float, float], text: str, size: int, fill: str, middle: bool = False) -> None:
        font = ImageFont.load_default(size * FINER)
        self.draw.text(
            (place[0] * FINER, place[1] * FINER), text, fill=fill, font=font, anchor="ma" if middle else "la"
        )

    def box(
        self, area: tuple[float, ...], fill: str | None = None, outline: str | None = None, radius: float = 6
    ) -> None:
        self.draw.rounded_rectangle(_large(area), radius * FINER, fill, outline, 2 * FINER if outline else 0)

    def line(self, points: tuple[float, ...], fill: str, width: float = 2) -> None:
        self.draw.line(_large(points), fill, round(width * FINER))

    def polygon(self, points: tuple[float, ...], fill: str) -> None:
        self.draw.polygon(_large(points), fill)

    def arrow(self, left: float, y: float, right: float) -> None:
        self.line((left, y, right - 8, y), ACCENT, 4)
        self.polygon((right - 12, y - 9, right, y, right - 12, y + 9), ACCENT)


def _large(numbers: tuple[float, ...]) -> list[float]:
    return [number * FINER for number in numbers]


def _inputs(pen: Pen, given: tuple[str, ...]) -> None:
    """A small sheet for each input, one below the other."""
    height, gap = 62, 12
    top = 226 - (len(given) * (height + gap) - gap) / 2
    for name in given:
        pen.box((32, top, 152, top + height), "#ffffff", FAINT)
        pen.text((92, top + 8), name, 19, INK, middle=True)
        if name == "prompt":
            for i, width in enumerate((88, 60)):
                pen.line((48, top + 38 + 10 * i, 48 + width, top + 38 + 10 * i), GREY, 3)
        else:
            pen.polygon((50, top + 54, 80, top + 34, 108, top + 54), HILLS[0])
            if name == "mask":
                pen.box((84, top + 34, 134, top + 56), INK, radius=11)
        top += height + gap


def _tokens(pen: Pen, card: Card) -> None:
    """The image as its tokens: a grid, each cell standing for as many tokens a side on every card."""
    left, top, side = 228, 142, 168
    cells = max(4, round(card.tokens**0.5 / 4))
    pen.box((left, top, left + side, top + side), FAINT, ACCENT, 4)
    for i in range(1, cells):
        at = i * side / cells
        pen.line((left + at, top, left + at, top + side), ACCENT, 0.7)
        pen.line((left, top + at, left + side, top + at), ACCENT, 0.7)
    middle = left + side / 2
    pen.text((middle, 320), f"{card.tokens:,} tokens", 22, INK, middle=True)
    if card.base:
        pen.text((middle, 348), f"instead of {card.base:,}", 18, GREY, middle=True)


def _picture(image: Image.Image, pen: Pen, area: tuple[int, int, int, int]) -> None:
    """A landscape: sky, sun, hills."""
    left, top, right, bottom = area
    width, height = right - left, bottom - top
    sky = Image.linear_gradient("L").resize((width * FINER, height * FINER))
    low, high = (Image.new("RGB", sky.size, color) for color in SKY)
    image.paste(Image.composite(low, high, sky), (left * FINER, top * FINER))
    x, y, r = left + 0.66 * width, top + 0.34 * height, 0.12 * width
    pen.draw.ellipse(_large((x - r, y - r, x + r, y + r)), SUN)
    pen.polygon(
        (left, top + 0.8 * height, left + 0.35 * width, top + 0.45 * height, left + 0.75 * width, bottom), HILLS[0]
    )
    pen.polygon((left, top + 0.8 * height, left + 0.75 * width, bottom, left, bottom), HILLS[0])
    pen.polygon(
        (left + 0.3 * width, bottom, left + 0.78 * width, top + 0.58 * height, right, top + 0.8 * height), HILLS[1]
    )
    pen.polygon((left + 0.3 * width, bottom, right, top + 0.8 * height, right, bottom), HILLS[1])


def draw(name: str) -> None:
    """Write NAME.jpg."""
    thumbnail(CARDS[name]).save(HERE / f"{name}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    for template in sys.argv[1:] or CARDS:
        draw(template)
        print(template)

"""Images from untrusted bytes: one way to open them, for every source of training images.

`decode` gives what a viewer shows, as 8-bit RGB: the first frame, upright by its EXIF orientation, and what is
transparent laid on white. `image_size` reads the header alone.
"""
# H, W pixels

from __future__ import annotations

import contextlib
import os
import struct
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OTHER_SUFFIXES = (".avif", ".heic", ".heif", ".jxl", ".jp2", ".jfif", ".ico", ".psd", ".svg", ".tga", ".ppm", ".exr")
# Only these decoders meet the bytes, whatever a file claims to be: others run programs (EPS) or are little tested.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 175_000_000  # H * W; Pillow itself stops a little later, at 2 * Image.MAX_IMAGE_PIXELS
MAX_BYTES = 1 << 30  # of an image file
ORIENTATION = 0x0112  # the tag in EXIF and TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
WHITE_IS_ZERO = 0  # in a TIFF
KEY_SCALE = {"L;2": 85, "L;4": 17}  # a PNG's colour key is counted in its own grey levels, pixels in 0..255


def image_size(file: BinaryIO, limit: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) that `decode` will give, from the header: pixels are not decoded.

    `file` is seekable and open for reading. Errors are those of `decode`, as far as the header shows them.
    """
    with _opened(file, limit) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # newer Pillow has turned its size already, older has not
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        return (width, height) if _orientation(image, file) >= 5 else (height, width)


def decode(file: BinaryIO, limit: int = MAX_PIXELS) -> Image.Image:
    """The first frame as an upright RGB image, 8 bits a channel.

    16-bit values are divided by 257 (of RGB the high byte is taken), floating values run from 0 to 1, CMYK, YCbCr and
    LAB are converted by Pillow without colour profiles, alpha, transparent palette entries and colour keys show white.

    Raises what Pillow raises for damaged or cut files (of any class), and ValueError for more than `limit` pixels,
    more than MAX_BYTES, and pixels whose range is not known (32-bit integers, floating values outside of 0..1).
    """
    with _opened(file, limit) as image:
        turn = UPRIGHT.get(_orientation(image, file))
        if isinstance(image, TiffImageFile):
            turn = None  # load() turns it
        raw = _raw_mode(image)
        inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
        image.load()
        rgb = to_rgb(image, raw, inverted)
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image, raw: str = "", inverted: bool = False) -> Image.Image:
    """A decoded image of any Pillow mode as RGB on white.

    raw: how its pixels lie in the file, in Pillow's words (`I;12`); inverted: in the file, white is 0. Both matter for
    more than 8 bits only.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(image, raw, inverted)).convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "P" and key is not None:
        image = image.convert("RGBA")
    if image.mode in TRANSPARENT:
        return _on_white(image)
    rgb = image.convert("RGB")
    return rgb if key is None or image.mode == "P" else _without_key(rgb, key, raw)


def fit(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image on white, its largest centred part of that shape scaled to (H, W); (3,H,W) float32 in -1..1."""
    image = to_rgb(image)
    height, width = size
    scale = min(image.height / height, image.width / width)  # pixels of the image in one of the result
    down, across = height * scale, width * scale
    top, left = (image.height - down) / 2, (image.width - across) / 2
    box = (left, top, min(left + across, image.width), min(top + down, image.height))
    array = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


@contextlib.contextmanager
def _opened(file: BinaryIO, limit: int) -> Iterator[Image.Image]:
    """The image, its header read and checked."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not 0 < length <= MAX_BYTES:
        raise ValueError(f"{length} bytes, expected an image of 1 to {MAX_BYTES}" if length else "an empty file")
    # Pillow warns of large images and of damaged EXIF; the first has its limit here, the second does no harm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"no image of a kind that is read here ({', '.join(FORMATS)}), or damaged") from None
        with image:
            if image.width < 1 or image.height < 1 or image.width * image.height > limit:
                raise ValueError(f"{image.width}x{image.height} pixels, expected 1 to {limit} in all; scale it down")
            yield image


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    """How a viewer turns the image, 1 to 8; 1 = not at all, also where EXIF cannot be read."""
    try:
        if isinstance(image, TiffImageFile):
            value = image.tag_v2.get(ORIENTATION, 1)
        else:
            # not image.getexif(): for a PNG without EXIF in front it decodes everything
            exif = Image.Image.getexif(image)
            if ORIENTATION not in exif and image.format == "PNG" and (block := _exif_of_png(file)):
                exif = Image.Exif()
                exif.load(block)
            value = exif.get(ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def _exif_of_png(file: BinaryIO) -> bytes | None:
    """The eXIf chunk wherever it stands: some programs write it behind the pixels. Leaves the file where it was."""
    place = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(min(length, 1 << 20))
            if kind == b"IEND":
                break
            file.seek(length + 4, os.SEEK_CUR)
        return None
    finally:
        file.seek(place)


def _raw_mode(image: Image.Image) -> str:
    """How pixels lie in the file, in Pillow's words: "RGB", "L;2", "I;12", ...; "" where it does not say."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _grey(image: Image.Image, raw: str, inverted: bool) -> np.ndarray:
    """(H,W) uint8 of an image with more than 8 bits a pixel, of which a colour key (16 bits) shows white."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN too
            raise ValueError(f"floating pixels from {values.min():g} to {values.max():g}, expected 0 to 1")
        levels = (values * 255).round().astype(np.uint8)
    elif image.mode == "I" and raw != "I;16B":  # older Pillow opens 16-bit PNG like this
        raise ValueError("32-bit or signed whole numbers have no known white; save it with 8 or 16 bits")
    else:
        values = np.asarray(image)
        white = 4095 if raw == "I;12" else 65535
        levels = ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
        if isinstance(key := image.info.get("transparency"), int):
            levels[values == key] = 255
    return 255 - levels if inverted else levels


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return white


def _without_key(rgb: Image.Image, key: object, raw: str) -> Image.Image:
    """The image with the pixels of its colour key white. Of 16-bit RGB only high bytes are there to compare."""
    if isinstance(key, int):
        key = (key * KEY_SCALE.get(raw, 1),) * 3
    if not isinstance(key, tuple) or len(key) != 3:
        return rgb
    if raw.startswith("RGB;16"):
        key = tuple(value >> 8 for value in key)
    array = np.array(rgb)
    array[(array == key).all(-1)] = 255
    return Image.fromarray(array)

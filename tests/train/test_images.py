"""What images.decode makes of files, against values worked out here with numpy; and what comes of damage."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from train import images
from train.samples import SampleError, sample


def decoded(data):
    """(H,W,3) of a file's bytes, through the boundary that sources use; its size must be what the header says."""
    with sample("a.file"):
        size = images.image_size(io.BytesIO(data))
        array = np.asarray(images.decode(io.BytesIO(data)))
    assert array.shape == (*size, 3)
    assert array.dtype == np.uint8
    return array


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows, width, depth, color, before=b"", after=b""):
    """A PNG of packed rows, written without Pillow."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def packed(values, depth):
    """Rows (H,W) of whole numbers as PNG packs them."""
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in values]
    bits = ((values[..., None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8)
    return [np.packbits(row.reshape(-1)).tobytes() for row in bits]


def near(found, expected, levels=1):
    assert np.abs(found.astype(int) - np.broadcast_to(expected, found.shape).astype(int)).max() <= levels


PATTERN = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
# What a viewer does with stored rows and columns to show them upright, from the EXIF standard's own table.
SHOWN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def exif_block(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation(orientation):
    image, exif = Image.fromarray(PATTERN), exif_block(orientation)
    expected = SHOWN[orientation](PATTERN)
    for data in (
        saved(image, "PNG", exif=exif),
        saved(image, "WEBP", lossless=True, exif=exif),
        saved(image, "TIFF", tiffinfo={274: orientation}),
        saved(image, "TIFF", compression="tiff_lzw", tiffinfo={274: orientation}),
        # behind the pixels, where some programs put it
        png([row.tobytes() for row in PATTERN], 10, 8, 2, after=chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))),
    ):
        assert np.array_equal(decoded(data), expected)
    jpeg = decoded(saved(Image.fromarray(PATTERN.repeat(8, 0).repeat(8, 1)), "JPEG", quality=100, exif=exif))
    near(jpeg, expected.repeat(8, 0).repeat(8, 1), 24)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"junk", exif_block(9), exif_block(0)])
def test_damaged_exif_does_no_harm(exif):
    assert np.array_equal(decoded(saved(Image.fromarray(PATTERN), "PNG", exif=exif)), PATTERN)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_every_depth_with_and_without_a_colour_key(depth):
    most = 2**depth - 1
    values = np.linspace(0, most, 16).round().astype(np.int64)[None].repeat(3, 0)
    expected = np.round(values * 255 / most)[..., None]
    near(decoded(png(packed(values, depth), 16, depth, 0)), expected)
    key = int(values[0, 5])
    keyed = np.where(values[..., None] == key, 255, expected)
    near(decoded(png(packed(values, depth), 16, depth, 0, chunk(b"tRNS", struct.pack(">H", key)))), keyed)


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_and_alpha_of_every_depth(depth):
    most, generator = 2**depth - 1, np.random.default_rng(depth)
    values = generator.integers(0, most + 1, (5, 7, 4))
    alpha = values[..., 3:] / most
    for color, channels in ((2, 3), (4, 2), (6, 4)):
        rows = packed(values[..., :channels].reshape(5, -1), depth)
        shown = values[..., :1].repeat(3, 2) if channels == 2 else values[..., :3]
        opacity = {2: values[..., 1:2] / most, 3: 1, 4: alpha}[channels]
        near(decoded(png(rows, 7, depth, color)), np.round(255 * (shown / most * opacity + 1 - opacity)), 2)
    rows, key = packed(values[..., :3].reshape(5, -1), depth), values[2, 3, :3]
    keyed = decoded(png(rows, 7, depth, 2, chunk(b"tRNS", struct.pack(">HHH", *key))))
    assert keyed[2, 3].tolist() == [255] * 3
    near(np.delete(keyed.reshape(-1, 3), 17, 0), np.delete(values[..., :3].reshape(-1, 3), 17, 0) * 255 / most)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_with_transparency(depth):
    generator, count = np.random.default_rng(depth), 2**depth
    colors, alpha = generator.integers(0, 256, (count, 3)), generator.integers(0, 256, count)
    values = np.arange(16)[None] % count
    for opacities in (alpha, alpha[:1], np.where(np.arange(count) == 1, 0, 255)):
        before = chunk(b"PLTE", colors.astype(np.uint8).tobytes())
        before += chunk(b"tRNS", opacities.astype(np.uint8).tobytes())
        whole = np.concatenate([opacities, np.full(count - len(opacities), 255)])[:, None] / 255
        on_white = np.round(colors * whole + 255 * (1 - whole))
        near(decoded(png(packed(values, depth), 16, depth, 3, before)), on_white[values])


def test_16_bit_tiff_and_float_tiff():
    ramp = np.linspace(0, 65535, 300).reshape(10, 30)
    for order in ("<u2", ">u2"):
        data = tiff(ramp.astype(order), order)
        near(decoded(data), np.round(ramp / 257)[..., None])
    near(decoded(tiff(ramp.astype("<u2"), "<u2", white_is_zero=True)), np.round(255 - ramp / 257)[..., None])
    near(decoded(saved(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF")), np.round(ramp / 257)[..., None])
    for outside in (ramp, ramp / 65535 - 0.5, ramp * np.nan):
        with pytest.raises(SampleError, match=r"a\.file: floating pixels from"):
            decoded(saved(Image.fromarray(outside.astype(np.float32)), "TIFF"))
    with pytest.raises(SampleError, match=r"a\.file: 32-bit"):
        decoded(saved(Image.fromarray(ramp.astype(np.int32)), "TIFF"))


def tiff(array, order, white_is_zero=False):
    """An uncompressed grey TIFF, written without Pillow."""
    end, mark = ("<", b"II") if order[0] == "<" else (">", b"MM")
    height, width = array.shape
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 0 if white_is_zero else 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, array.nbytes)]
    block = struct.pack(end + "H", len(tags))
    for tag, value in tags:
        block += struct.pack(end + "HHII", tag, 4, 1, value)
    return mark + struct.pack(end + "HI", 42, 8 + array.nbytes) + array.tobytes() + block + struct.pack(end + "I", 0)


def test_cmyk_ycbcr_and_lab():
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (4, 4, 4), dtype=np.uint8)
    ink, key = blocks[..., :3] / 255, blocks[..., 3:] / 255
    expected = np.round(255 * (1 - ink) * (1 - key))
    near(decoded(saved(Image.frombytes("CMYK", (4, 4), blocks.tobytes()), "TIFF")), expected, 2)
    large = blocks.repeat(16, 0).repeat(16, 1)
    # Pillow writes CMYK JPEG as Adobe does, inverted
    jpeg = decoded(saved(Image.frombytes("CMYK", (64, 64), large.tobytes()), "JPEG", quality=100, subsampling=0))
    near(jpeg[8::16, 8::16], expected, 8)
    grey = np.arange(0, 256, 17, dtype=np.uint8)
    yccs = np.stack([grey, np.full(16, 128), np.full(16, 128)], -1).astype(np.uint8)[None].repeat(2, 0)
    near(np.asarray(images.to_rgb(Image.frombytes("YCbCr", (16, 2), yccs.tobytes()))), grey[None, :, None], 2)
    lab = np.zeros((1, 2, 3), np.uint8)
    lab[0, 0, 0] = 255  # L* of white; a* and b* are 0
    near(decoded(saved(Image.frombytes("LAB", (2, 1), lab.tobytes()), "TIFF")), np.array([[[255] * 3, [0] * 3]]), 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 6), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    near(decoded(data), np.array([255, 0, 0]), 2)


def test_a_transparent_gif_is_laid_on_white():
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 4, 6))
    array = decoded(saved(image, "GIF", transparency=0))
    near(array[:, :4], np.array([255, 255, 255]), 0)
    near(array[:, 4:], np.array([255, 0, 0]), 0)


def test_a_header_of_a_decompression_bomb_is_refused_at_once():
    before, begin = Image.MAX_IMAGE_PIXELS, time.monotonic()
    huge = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 6, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(SampleError, match=r"a\.file: "):
        decoded(data)
    with pytest.raises(ValueError, match="100x100 pixels, expected 1 to 9999"):
        images.image_size(io.BytesIO(saved(Image.new("RGB", (100, 100)))), limit=9999)
    assert time.monotonic() - begin < 2
    assert before == Image.MAX_IMAGE_PIXELS


def test_large_images_below_the_limit_give_no_warning():
    data = saved(Image.new("1", (12_000, 8_000)))  # Pillow warns from 89 million on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert images.image_size(io.BytesIO(data)) == (8_000, 12_000)


def test_other_decoders_never_see_the_bytes():
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", b"P6 2 2 255\n" + bytes(12)):
        with pytest.raises(SampleError, match="no image of a kind that is read here"):
            decoded(data)


def test_a_strip_of_one_pixel_is_scaled_without_a_giant_in_between():
    begin = time.monotonic()
    tensor = images.fit(Image.new("RGB", (60_000, 1), (255, 0, 0)), (512, 512))
    assert tuple(tensor.shape) == (3, 512, 512)
    assert tensor.mean((1, 2)).tolist() == [1, -1, -1]
    assert time.monotonic() - begin < 5


NOISE = Image.effect_noise((40, 30), 60).convert("RGB")
WHOLE = {kind: saved(NOISE, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}
WHOLE["LZW"] = saved(NOISE, "TIFF", compression="tiff_lzw")


@pytest.mark.parametrize("kind", WHOLE)
def test_files_cut_at_many_lengths(kind):
    """An error that names the file, or, where nothing but the end mark is gone, the image."""
    data = WHOLE[kind]
    expected = decoded(data)
    for length in sorted(
        {*range(0, 64), *range(0, len(data), max(1, len(data) // 97)), *range(len(data) - 16, len(data))}
    ):
        try:
            found = decoded(data[:length])
        except SampleError as error:
            assert str(error).startswith("a.file: ")  # noqa: PT017
        else:
            assert length >= len(data) - 16, f"{length} of {len(data)} bytes were taken for the image"
            if kind != "GIF":
                assert np.array_equal(found, expected)


@settings(max_examples=300, deadline=5000, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.floats(0.3, 1),
)
def test_changed_bytes_give_an_image_or_a_named_error(kind, edits, cut):
    data = bytearray(WHOLE[kind])
    for place, value in edits:
        data[int(place**3 * len(data))] = value  # most in the header
    try:
        decoded(bytes(data[: max(1, int(cut * len(data)))]))
    except SampleError as error:
        assert str(error).startswith("a.file: ")  # noqa: PT017


@settings(max_examples=200, deadline=5000)
@given(head=st.sampled_from([b"", *(data[:12] for data in WHOLE.values())]), data=st.binary(max_size=400))
def test_random_bytes_give_a_named_error(head, data):
    try:
        decoded(head + data)
    except SampleError as error:
        assert str(error).startswith("a.file: ")  # noqa: PT017


def test_a_setting_of_the_host_program_is_left_alone():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False

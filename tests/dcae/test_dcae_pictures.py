"""The toy DC-AE on real 4K pictures: PSNR with and without strips is the same.

Pictures come from Debian's gnome-backgrounds / plasma-workspace-wallpapers where they are installed: one of them, to be
quick. All 4K pictures of folders of your choice, with the figures printed:

    DCGEN_PICTURES=/usr/share/backgrounds:/usr/share/wallpapers pytest -s tests/dcae/test_dcae_pictures.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcgen.dcae import free_memory, load_dcae
from dcgen.dcae.quality import psnr

TOY = Path(__file__).resolve().parents[2] / "toy" / "dc-ae-f32"
CHOSEN = os.environ.get("DCGEN_PICTURES")
PLACES = CHOSEN.split(os.pathsep) if CHOSEN else ["/usr/share/wallpapers", "/usr/share/backgrounds"]
WIDTH, HEIGHT = 3840, 2144  # 4K UHD at a multiple of 32
STRIPS = (1, 7) if CHOSEN else (1,)


def pictures(places: Sequence[str]) -> list[Path]:
    """The pictures of at least WIDTH x HEIGHT below the places."""
    found = []
    for place in places:
        for path in sorted(Path(place).rglob("*")):
            if path.suffix.lower() in (".jpg", ".png", ".webp"):
                with Image.open(path) as image:
                    if image.width >= WIDTH and image.height >= HEIGHT:
                        found.append(path)
    return found


FOUND = pictures(PLACES)
NONE = pytest.param(None, marks=pytest.mark.skip(reason=f"no pictures of {WIDTH}x{HEIGHT} or more below {PLACES}"))


@pytest.mark.parametrize(
    "path", (FOUND if CHOSEN else FOUND[:1]) or [NONE], ids=lambda path: "/".join(path.parts[-4:]) if path else "none"
)
@torch.no_grad()
def test_psnr_of_a_4k_picture_is_the_same_with_strips(path: Path) -> None:
    if free_memory(torch.device("cpu")) < 4 << 30:
        pytest.skip("decoding a 4K picture whole, to compare with, takes about 2 GiB")
    model = load_dcae(TOY, dtype=torch.float32)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").crop((0, 0, WIDTH, HEIGHT)), dtype=np.float32)
    original = torch.from_numpy(pixels).movedim(-1, 0)[None] / 255
    latent, whole = (model.encode(original * 2 - 1, strip) for strip in (2, None))
    assert (latent - whole).abs().max() < 1e-4 * whole.abs().max()
    values = {strip: psnr(original, (model.decode(latent, strip) / 2 + 0.5).clamp(0, 1)) for strip in (None, *STRIPS)}
    print(f"\n{path}: {', '.join(f'{value:.6f} dB with strip={strip}' for strip, value in values.items())}")
    assert values[None] > 10
    for strip in STRIPS:
        assert values[strip] == pytest.approx(values[None], abs=1e-4)

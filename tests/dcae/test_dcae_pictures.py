"""The toy DC-AE on real 4K photographs: PSNR with and without strips is the same.

Pictures come from Debian's gnome-backgrounds / plasma-workspace-wallpapers where they are installed, or from the folder
that DCGEN_PICTURES names. Without any, the test skips.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcgen.dcae import free_memory, load_dcae
from dcgen.dcae.quality import psnr

TOY = Path(__file__).resolve().parents[2] / "toy" / "dc-ae-f32"
PLACES = ("/usr/share/backgrounds", "/usr/share/wallpapers")
WIDTH, HEIGHT = 3840, 2144  # 4K UHD at a multiple of 32


def pictures() -> list[Path]:
    named = os.environ.get("DCGEN_PICTURES")
    for place in [named] if named else PLACES:
        large = []
        for path in sorted(Path(place).rglob("*")):
            if path.suffix.lower() in (".jpg", ".png", ".webp"):
                with Image.open(path) as image:
                    if image.width >= WIDTH and image.height >= HEIGHT:
                        large.append(path)
        if large:
            return large[:: max(1, len(large) // 2)][:2]
    return []


@torch.no_grad()
def test_psnr_of_4k_photographs_is_the_same_with_strips() -> None:
    if not (TOY / "config.json").is_file():
        pytest.skip("the toy DC-AE is not in this checkout")
    found = pictures()
    if not found:
        pytest.skip(f"no pictures of {WIDTH}x{HEIGHT} or more in {PLACES} or DCGEN_PICTURES")
    if free_memory(torch.device("cpu")) < 4 << 30:
        pytest.skip("decoding a 4K picture whole, to compare with, takes about 2 GiB")
    model = load_dcae(TOY, dtype=torch.float32)
    for path in found:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").crop((0, 0, WIDTH, HEIGHT)), dtype=np.float32)
        original = torch.from_numpy(pixels).movedim(-1, 0)[None] / 255
        latent = model.encode(original * 2 - 1, 2)
        values = [psnr(original, (model.decode(latent, strip) / 2 + 0.5).clamp(0, 1)) for strip in (None, 1, 7)]
        whole = model.encode(original * 2 - 1)
        assert (latent - whole).abs().max() < 1e-4 * whole.abs().max()
        print(f"{path.name}: {values[0]:.4f} dB whole, {values[1]:.4f} and {values[2]:.4f} in strips of 1 and 7")
        assert values[1] == pytest.approx(values[0], abs=1e-4)
        assert values[2] == pytest.approx(values[0], abs=1e-4)
        assert values[0] > 10

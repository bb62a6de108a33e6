"""Make toy/data from two npm packs: `python -m train.toy.build_data [--packs FOLDER] [--out toy/data]`."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from train.files import sha256, write_folder, write_json

EMOJI = ("@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz")
LABELS = ("emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz")
SHA256 = {
    EMOJI[2]: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    LABELS[2]: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
TEMPLATE = "{subject} on a {color} background"
PIXELS = 128  # stored side; the pack has 256, the toy draws at most 108

# Thirty-two images that a person tells apart at a glance; the names are emojibase's English labels.
SUBJECTS = [
    "strawberry",
    "watermelon",
    "lemon",
    "carrot",
    "mushroom",
    "hamburger",
    "pizza",
    "doughnut",
    "dog face",
    "cat face",
    "panda",
    "frog",
    "pig face",
    "koala",
    "penguin",
    "butterfly",
    "lady beetle",
    "octopus",
    "whale",
    "turtle",
    "automobile",
    "bus",
    "rocket",
    "house",
    "star",
    "balloon",
    "soccer ball",
    "sunflower",
    "cactus",
    "ghost",
    "robot",
    "crown",
]
COLORS = {
    "white": (240, 240, 240),
    "black": (40, 40, 46),
    "red": (205, 70, 66),
    "yellow": (240, 208, 92),
    "green": (108, 182, 110),
    "blue": (92, 146, 222),
    "pink": (244, 176, 204),
    "purple": (140, 98, 186),
}

NOTICE = """\
The pictures are Microsoft's Fluent emoji (3D), copyright (c) Microsoft Corporation, as packed in the npm package
{emoji} {emoji_version} (LobeHub). Resized to {pixels} px. The captions' words are the English labels of the npm package
{labels} {labels_version}, copyright (c) 2017-2019 Miles Johnson. Both under the MIT License:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def fetch(pack: tuple[str, str, str], folder: Path) -> Path:
    """Path of an npm pack in `folder`, fetched with `npm pack` when absent; a wrong checksum is an error."""
    name, version, file = pack
    path = folder / file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
    digest = sha256(path)
    if digest != SHA256[file]:
        raise ValueError(f"{path}: sha256 is {digest}, expected {SHA256[file]}; delete it and run this again")
    return path


def build(packs: Path, out: Path) -> None:
    """Write the subjects as RGBA webp (lossless), captions.json and LICENSE.txt into `out`, whole or not at all."""
    with tarfile.open(fetch(LABELS, packs)) as tar:
        labels = json.load(_member(tar, "package/en/data.json"))
    codes = {entry["label"]: entry["hexcode"].lower() for entry in labels}
    # Each colour lacks S/K subjects and each subject one colour: an eighth of all pairs is never trained on.
    held_out = [(s, (5 * s + s // len(COLORS) + 3) % len(COLORS)) for s in range(len(SUBJECTS))]
    described: dict[str, Any] = {
        "template": TEMPLATE,
        "subjects": [{"name": name, "file": f"{codes[name]}.webp"} for name in SUBJECTS],
        "colors": [{"name": name, "rgb": rgb} for name, rgb in COLORS.items()],
        "held_out": held_out,
        "sources": [{"npm": p[0], "version": p[1], "sha256": SHA256[p[2]], "licence": "MIT"} for p in (EMOJI, LABELS)],
    }
    notice = NOTICE.format(
        emoji=EMOJI[0], emoji_version=EMOJI[1], labels=LABELS[0], labels_version=LABELS[1], pixels=PIXELS
    )

    def write(folder: Path) -> None:
        with tarfile.open(fetch(EMOJI, packs)) as tar:
            for entry in described["subjects"]:
                image = Image.open(_member(tar, f"package/assets/{entry['file']}")).convert("RGBA")
                image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS).save(folder / entry["file"], lossless=True)
        write_json(folder / "captions.json", described)
        (folder / "LICENSE.txt").write_text(notice, encoding="utf-8")

    write_folder(out, write)


def _member(tar: tarfile.TarFile, name: str) -> io.BytesIO:
    handle = tar.extractfile(name)
    if handle is None:
        raise ValueError(f"{tar.name!r}: no file {name}")
    return io.BytesIO(handle.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packs", type=Path, default=Path("runs/packs"), help="folder of the two .tgz files")
    parser.add_argument("--out", type=Path, default=Path("toy/data"))
    options = parser.parse_args()
    build(options.packs, options.out)


if __name__ == "__main__":
    main()

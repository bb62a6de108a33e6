"""Folders of images with their prompts: those that this command draws, and any other."""
# B images, H W pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcgen.fields import check_fields, items, mapping, text, whole
from dcgen.files import naming, opened
from train.captions import MAX_CHARACTERS, read_lines
from train.evaluate.prompts import Prompt
from train.files import read_json, write_json
from train.images import SUFFIXES, decode, image_size
from train.samples import printable, sample

INDEX = "index.json"
EXACT = ".safetensors"  # beside an image: its values before they were rounded to 8 bits
MAX_IMAGES = 1 << 24
ENTRY = {"file": text(255), "index": whole(0, 1 << 63), "seed": whole(0, 1 << 63)}


@dataclass(frozen=True)
class Drawn:
    """One image of a folder: its file, the prompt and that prompt's number in the set, and the seed."""

    path: Path
    prompt: Prompt
    index: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Its file's name, which the same prompt and seed have in another folder of ours."""
        return self.path.stem

    @property
    def key(self) -> tuple[int, str, int]:
        """What it has in common with other models' images of the same prompt and seed, whatever they are called."""
        return self.index, self.prompt.text, self.seed


def file_name(index: int, seed: int) -> str:
    """Name of the image of a prompt and a seed."""
    return f"{index:06d}-s{seed}.png"


def write_index(folder: Path, images: Sequence[Drawn]) -> None:
    """Write FOLDER/index.json, which read_folder() reads: prompts, and of each image the prompt's number and seed."""
    prompts = {image.index: image.prompt for image in images}
    write_json(
        folder / INDEX,
        {
            "prompts": {
                str(index): {"prompt": prompt.text, "domain": prompt.domain, "record": prompt.record}
                for index, prompt in prompts.items()
            },
            "images": [{"file": image.path.name, "index": image.index, "seed": image.seed} for image in images],
        },
    )


def read_folder(folder: Path, prompts: Sequence[Prompt] = ()) -> list[Drawn]:
    """The images of a folder with their prompts.

    They come from its index.json, else from a text file beside each image (0001.png, 0001.txt), else from `prompts` in
    the order of the names, of which there must be as many. Errors name the folder and what is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of images")
    if (folder / INDEX).is_file():
        return _indexed(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    texts = [path.with_suffix(".txt") for path in paths]
    if all(path.is_file() for path in texts):
        prompts = [_beside(path) for path in texts]
    elif len(prompts) != len(paths):
        missing = next(path for path in texts if not path.is_file())
        raise ValueError(
            f"{folder} holds {len(paths)} images, and there are {len(prompts)} prompts; give a prompt file with one "
            f"for each image in the order of their names, or write each beside its image ({missing.name} is missing)"
        )
    return [Drawn(path, prompt, number) for number, (path, prompt) in enumerate(zip(paths, prompts, strict=True))]


def _beside(path: Path) -> Prompt:
    return Prompt(" ".join(read_lines(path)))


def _indexed(folder: Path) -> list[Drawn]:
    path = folder / INDEX
    record = read_json(path)
    with naming(path):
        check_fields(
            record, {"prompts": mapping, "images": items(mapping, 1, MAX_IMAGES)}, needed=("prompts", "images")
        )
        prompts = {name: _prompt(value) for name, value in record["prompts"].items()}
        found = []
        for entry in record["images"]:
            check_fields(entry, ENTRY, needed=tuple(ENTRY))
            name, number = entry["file"], str(entry["index"])
            if Path(name).name != name or number not in prompts:
                raise ValueError(f"image {printable(name)}: not a file of this folder with a prompt in `prompts`")
            found.append(Drawn(folder / name, prompts[number], entry["index"], entry["seed"]))
    missing = [image.path.name for image in found if not image.path.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(found)} images are not there ({missing[0]}, ...); run the same command "
            "again to draw them"
        )
    return found


def _prompt(value: Any) -> Prompt:
    fields = {"prompt": text(MAX_CHARACTERS), "domain": text(1000), "record": mapping}
    check_fields({"prompt": value}, {"prompt": mapping}, needed=())
    check_fields(value, fields, needed=("prompt",))
    return Prompt(value["prompt"], value.get("domain", ""), value.get("record", {}))


def open_image(path: Path) -> Image.Image:
    """An image as upright RGB of 8 bits; a SampleError names the file."""
    with sample(printable(str(path))), open(path, "rb") as file:
        return decode(file)


def size_of(path: Path) -> tuple[int, int]:
    """(H, W) from the header; a SampleError names the file."""
    with sample(printable(str(path))), open(path, "rb") as file:
        return image_size(file)


def pixels(path: Path) -> Tensor:
    """(3,H,W) uint8."""
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)


def exact(path: Path) -> Tensor:
    """(3,H,W) float32 in -1..1: what was drawn where that was kept beside the image, else the image's 8 bits."""
    kept = path.with_suffix(EXACT)
    if kept.is_file():
        with opened(kept) as file:
            return file.get_tensor("image")
    return pixels(path).float() / 127.5 - 1

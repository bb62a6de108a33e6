"""Every template has a thumbnail of a result or a diagram, with the sizes that its graph has."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from dcgen.backbones import BACKBONES

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
SHIPPED = ("dcae_roundtrip", "dcgen_toy", "dcgen_toy_custom", "dcgen_toy_sana")  # with images that the toy drew


def _module():
    spec = importlib.util.spec_from_file_location("workflows_thumbnail", FOLDER / "thumbnail.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["workflows_thumbnail"] = module
    spec.loader.exec_module(module)
    return module


THUMBNAIL = _module()


def test_every_template_has_one():
    names = sorted(file.stem for file in FOLDER.glob("*.json"))
    assert sorted([*THUMBNAIL.CARDS, *SHIPPED]) == names
    assert sorted(file.stem for file in FOLDER.glob("*.jpg")) == names


@pytest.mark.parametrize("name", list(THUMBNAIL.CARDS))
def test_the_file_is_what_the_card_draws(name):
    with Image.open(FOLDER / f"{name}.jpg") as stored:
        drawn = THUMBNAIL.thumbnail(THUMBNAIL.CARDS[name])
        assert stored.size == drawn.size
        assert max(ImageStat.Stat(ImageChops.difference(stored.convert("RGB"), drawn)).mean) < 3


@pytest.mark.parametrize("name", list(THUMBNAIL.CARDS))
def test_pixels_and_tokens_are_those_of_the_graph(name):
    card = THUMBNAIL.CARDS[name]
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    sizes = by_kind.get("DCGenEmptyLatent") or by_kind["DCGen4KSampler"]
    image = "LoadImage" in by_kind  # then the image's own size counts
    stated = sizes["width"] if sizes["size"] == "width x height" else int(sizes["size"].split(" x ")[-1])
    assert image or stated == card.pixels
    deep = 64 if "f64" in str(graph) or "Res4K" in str(graph) else 32
    assert card.tokens == BACKBONES["flux"].tokens(card.pixels, card.pixels, deep, 1)
    if card.base:
        factor, patch = (32, 1) if "sana" in name else (8, 2)
        assert card.base == BACKBONES["flux"].tokens(card.pixels, card.pixels, factor, patch)

"""Fixtures: folders of images in two styles, and a browser."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.evaluate.images import Drawn, file_name, write_index
from train.evaluate.prompts import PromptSet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def draw_folder():
    """draw_folder(folder, shade, count): images of the sample prompts, whose pixels tell folder and prompt apart."""

    def draw(folder: Path, shade: int, count: int = 6, size: tuple[int, int] = (96, 64)) -> list[Drawn]:
        folder.mkdir(parents=True)
        prompts = PromptSet(first=count).read()
        found = []
        for index, prompt in enumerate(prompts):
            array = np.full((*reversed(size), 3), shade, np.uint8)
            array[:8, :8] = index
            path = folder / file_name(index, 0)
            Image.fromarray(array).save(path)
            found.append(Drawn(path, prompt, index))
        write_index(folder, found)
        return found

    return draw


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A headless Chromium; the tests skip where there is none."""
    name = "comfy_tests_browser"  # tests/comfy loads it under this name, too
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "comfy" / "browser.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    driver = sys.modules[name]
    program = driver.find_chromium()
    if program is None:
        pytest.skip("no Chromium found: set CHROMIUM_PATH, or install one")
    page = driver.Browser(program, tmp_path_factory.mktemp("chromium"))
    yield page
    page.close()

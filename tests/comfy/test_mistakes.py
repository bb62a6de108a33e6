"""What beginners do wrong in ComfyUI is answered with the file or value, what was expected, and what to do."""

from __future__ import annotations

import pytest

from benchmarks.walk.mistakes import GRAPHS, graph_outcome
from train.comfy_client import ComfyServer

pytestmark = pytest.mark.once_per_core


@pytest.fixture(scope="module")
def own(comfy):
    """A server whose folder may be filled with broken files."""
    with ComfyServer(comfy.root) as server:
        yield server


@pytest.mark.parametrize("mistake", GRAPHS, ids=lambda mistake: mistake.title)
def test_graph(own, mistake):
    mistake.files(own.folder / "models")
    outcome = graph_outcome(own, mistake)
    if (
        mistake.logged
        and not outcome.message
        and "downscale_ratio" in (own.comfyui / "comfy" / "sample.py").read_text(encoding="utf-8")
    ):
        pytest.skip("this core adapts its empty latent to the model: nothing goes wrong")
    assert not outcome.missing, outcome.message

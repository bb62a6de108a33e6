"""The speed benchmark's arithmetic, against torch's own counter, the paper's ratios, and a clock that is made up."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed


@pytest.mark.parametrize(("width", "tokens"), [(256, 64), (256, 1024), (512, 256)])
def test_multiplications_are_those_of_the_network(width, tokens):
    """Within the embedders, modulation and head, which the formula leaves out: they do not grow with the depth."""
    with torch.device("meta"):
        model = speed.flux(width, {"transformer_blocks": 2, "single_transformer_blocks": 3})
    inputs = speed.step_inputs(tokens, speed.BASE, torch.device("meta"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    counted = sum(
        sum(flops.values())
        for name, flops in counter.get_flop_counts().items()
        if name.count(".") == 2 and "transformer_blocks" in name
    )
    assert counted / 2 == pytest.approx(speed.multiplications(tokens, width, 5), rel=0.02)


def test_the_papers_own_ratios():
    base, dcgen = speed.PAPER["H100 image"].values()
    assert [a / b for a, b in zip(base, dcgen, strict=True)] == pytest.approx([4.22, 16.85, 52.92], rel=2e-3)


def test_tokens_are_what_dcgen_saves():
    for size, ratio in {"1K": 4, "2K": 16, "4K": 16}.items():
        latent, pixels = speed.DCGEN[size], speed.PIXELS[size]
        base = speed.FLUX.tokens(pixels, pixels, speed.BASE.factor, speed.BASE.patch)
        assert base / speed.FLUX.tokens(pixels, pixels, latent.factor, latent.patch) == ratio
        assert speed.VARIANTS[latent.autoencoder].latent_channels == latent.channels
        assert speed.VARIANTS[latent.autoencoder].spatial_factor == latent.factor


class Slow(nn.Module):
    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock[0] += self.seconds
        return x


def test_one_block_counts_as_often_as_the_model_has_it():
    """19 blocks of 2 s, 38 of 3 s and 5 s around them, of which one each is run."""
    clock = [0.0]
    at = speed.Machine(torch.device("cpu"), torch.float32, 8, dict.fromkeys(speed.BLOCKS, 1), lambda: clock[0])
    double, single, rest = nn.ModuleList([Slow(clock, 2.0)]), nn.ModuleList([Slow(clock, 3.0)]), Slow(clock, 5.0)

    def call():
        return rest(single[0](double[0](torch.zeros(1))))

    counts = dict(zip(speed.BLOCKS, ((double, 19), (single, 38)), strict=True))
    for _ in range(2):  # hooks are gone after each
        assert speed.whole_time(at, call, counts) == pytest.approx(19 * 2 + 38 * 3 + 5)


def test_a_narrow_network_from_end_to_end(monkeypatch):
    """Rows and ratios of a run whose clock ticks once a look; the embedder and head follow the latent."""
    ticks = itertools.count()
    width = 128
    at = speed.Machine(torch.device("cpu"), torch.float32, width, dict.fromkeys(speed.BLOCKS, 1), lambda: next(ticks))
    monkeypatch.setattr(speed, "WIDTH", width)
    monkeypatch.setattr(speed, "text_seconds", lambda at: 3.0)
    monkeypatch.setattr(speed, "decode_seconds", lambda at, latent, pixels: 2.0)
    monkeypatch.setattr(speed, "PIXELS", {"1K": 256, "2K": 512, "4K": 1024})
    with torch.inference_mode():
        rows = speed.measure(at, ["1K"], steps=10, repeats=2)
    assert [row.tokens for row in rows] == [256, 64]
    for row in rows:
        assert row.image_s == 3 + 10 * row.step_s + 2
    assert rows[0].step_bytes > rows[1].step_bytes > 0
    found = speed.ratios(rows, width)["1K"]
    assert found["tokens"] == 4
    assert found["step"] == rows[0].step_s / rows[1].step_s
    assert "4.00x" in speed.table({"1K": found})
    assert all(
        torch.isfinite(value).all() for value in speed.make(lambda: nn.Linear(300, 7), at.device, at.dtype).parameters()
    )

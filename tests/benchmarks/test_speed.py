"""The speed benchmark's arithmetic, against the formulas of the papers, their ratios, and a clock that is made up."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import speed

FLUX, SANA = speed.MODELS["flux"], speed.MODELS["sana-1.6b"]


def tiny_flux(blocks, latent):
    return speed.flux(blocks, latent, width=256, head=128)


def ticking():
    ticks = itertools.count()
    return speed.Machine(torch.device("cpu"), torch.float32, False, lambda: next(ticks))


def block_flops(model, latent, tokens, names):
    """Operations of one more block of each kind."""
    more = dict.fromkeys(names, 2)
    found = [speed.counted(model, latent, tokens, 1024, blocks)[0] for blocks in (more, dict.fromkeys(names, 1))]
    return found[0] - found[1]


@pytest.mark.parametrize("tokens", [256, 1024])
def test_operations_of_flux(tokens):
    """12 D^2 a token in the linear layers of a block of either kind, 2 N D in its attention; modulation is 2% more."""
    n, D = tokens + 512, 3072
    multiplications = 2 * n * (12 * D**2 + 2 * n * D)
    assert block_flops(FLUX, FLUX.base, tokens, FLUX.blocks) / 2 == pytest.approx(multiplications, rel=0.02)


@pytest.mark.parametrize("tokens", [256, 1024])
def test_operations_of_sana(tokens):
    """A block on a batch of two: 6 D^2 in both attentions' linear layers, 7.5 D^2 and the 3x3 in the feed-forward, the
    text's key and value; linear attention costs D heads' width twice, cross-attention the text's length."""
    D, head, text = 2240, 32, speed.PROMPT_TOKENS
    each = 6 * D**2 + 7.5 * D**2 + 9 * 5 * D + 2 * D * (head + 1) + 2 * text * D
    multiplications = 2 * (tokens * each + text * 2 * D**2)
    found = block_flops(SANA, SANA.base, tokens, SANA.blocks) / 2
    assert found == pytest.approx(multiplications, rel=0.02)


def test_the_papers_own_ratios():
    pairs = FLUX.paper["H100 image"].values()
    assert [a / b for a, b in pairs] == pytest.approx([4.22, 16.85, 52.92], rel=2e-3)
    found = [speed.MODELS[name].paper["H100 throughput"]["1K"] for name in ("sana-1.6b", "sana-4.8b", "flux")]
    assert [a / b for a, b in found] == pytest.approx([3.94, 3.88, 4.12], rel=2e-3)


@pytest.mark.parametrize(("model", "saved"), [(FLUX, (4, 16, 16)), (SANA, (4, 4, 4))])
def test_tokens_are_what_dcgen_saves(model, saved):
    for size, ratio in zip(speed.PIXELS, saved, strict=True):
        latent = model.dcgen[size]
        assert model.tokens(size, model.base) / model.tokens(size, latent) == ratio
        assert speed.VARIANTS[latent.autoencoder].latent_channels == latent.channels
        assert speed.VARIANTS[latent.autoencoder].spatial_factor == latent.factor


def test_a_narrow_network_from_end_to_end(monkeypatch):
    """Rows and ratios of a run whose clock ticks once a look; what a CPU does not run is a dash, and no image is told
    from a part of the blocks."""
    monkeypatch.setattr(speed, "PIXELS", {"1K": 256, "2K": 512, "4K": 1024})
    monkeypatch.setattr(speed, "CPU_TOKENS", 600)
    monkeypatch.setattr(speed, "text_seconds", lambda at, model: 3.0)
    decoded = []
    monkeypatch.setattr(speed, "decode", lambda ae, latents: decoded.append(tuple(latents.shape)))
    model = replace(FLUX, network=tiny_flux)
    with torch.inference_mode():
        rows = speed.measure(ticking(), model, ["1K", "2K"], steps=10, repeats=2)
    assert [row.tokens for row in rows] == [256, 64, 1024, 64]
    assert [row.step_s for row in rows] == [1, 1, None, 1]
    assert all(row.image_s is None and row.blocks == "1+2 of 19+38" for row in rows)
    assert (1, 16, 32, 32) in decoded
    assert rows[0].step_bytes > rows[1].step_bytes > 0
    found = speed.ratios(model, rows)
    assert found["1K"]["tokens"] == 4
    assert found["1K"]["step, operations"] == rows[0].step_flops / rows[1].step_flops
    assert found["1K"]["paper, H100 image"] == pytest.approx(4.65 / 1.10)
    assert "step" not in found["2K"]
    assert "image" not in found["1K"]
    assert "-" in speed.line(rows[2])
    assert "4.00x" in speed.table({"FLUX": found})
    whole = replace(ticking(), whole=True)
    few = replace(model, blocks={"transformer_blocks": 1, "single_transformer_blocks": 1})
    with torch.inference_mode():
        (row, _) = speed.measure(whole, few, ["1K"], steps=10, repeats=1)
    assert row.image_s == 3 + 10 * row.step_s + row.decode_s


def test_both_networks_do_the_same_work():
    """A narrow pair: equal results, in turns, ours in less memory."""
    sizes = {"num_attention_heads": 8, "num_cross_attention_heads": 8, "cross_attention_head_dim": 32}
    with torch.inference_mode():
        for prompt in (50, 300):
            one = speed.contest(ticking(), 256, prompt, repeats=3, **sizes)
            assert one.error < 1e-5
            assert one.ours_s == one.diffusers_s == 1
            assert one.ours_bytes < one.diffusers_bytes


def test_results_are_written_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "contests", lambda at, repeats: [speed.Contest(256, 50, 2, 1.0, 2.0, 3, 4, 0.0)])
    speed.main(["--models", "network", "--threads", "1", "--device", "cpu", "--out", str(tmp_path / "speed.json")])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["network"][0]["diffusers_s"] == 2.0
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]

"""SANA's peak of live activations, which the memory estimate of the ComfyUI model is made from."""

import ast
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcgen.backbones.sana import SanaConfig, SanaNet, network

BRIDGE = Path(__file__).resolve().parents[2] / "nodes" / "bridge" / "families" / "sana" / "__init__.py"


class Live(TorchDispatchMode):
    """Bytes of all storages made while it is on and still alive: now, and at most."""

    def __init__(self, given):
        super().__init__()
        self.sizes, self.now, self.peak = dict.fromkeys(given, 0), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key):
        self.now -= self.sizes.pop(key)


def estimate():
    """The bridge's constant, read without importing ComfyUI."""
    for line in ast.parse(BRIDGE.read_text()).body:
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "PEAK_WIDTHS":
            return ast.literal_eval(line.value)
    raise AssertionError("no PEAK_WIDTHS")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_estimate_covers_the_peak_and_not_much_more(dtype, batch, monkeypatch):
    monkeypatch.setattr(network, "STRIP_CPU", network.STRIP)  # the estimate is for a GPU
    heads, side = 8, 24
    config = SanaConfig(
        num_attention_heads=heads,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=32,
        num_layers=2,
        caption_channels=24,
        qk_norm="rms_norm_across_heads",
        interpolation_scale=1.0,
    )
    net = SanaNet(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    x = torch.randn(batch, 32, side, side, generator=generator).to(dtype)
    text = torch.randn(batch, 30, 24, generator=generator).to(dtype)
    given = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), x, text)}
    with torch.inference_mode(), Live(given) as live:
        net(x, torch.full((batch,), 500.0), text, torch.ones(batch, 30))
    widths = live.peak / (batch * side * side * config.width * dtype.itemsize)
    stated = estimate()
    assert 0.8 * stated < widths < stated

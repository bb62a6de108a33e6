"""Run as a program: what users run on MPS or DirectML, on a device that refuses float64 as those do.

The device is pretended: its tensors are computed on the CPU, and an operation that would give one of float64 is an
error. Prints {check: "" or its traceback} as JSON. A program of its own, because a device that torch knows stays in
its process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from dcgen.backbones.sana.network import SanaConfig, SanaNet
from dcgen.dcae import DCAE, VARIANTS
from dcgen.dcae.quality import common_part, psnr
from dcgen.extract import factor
from dcgen.latent import LatentSpace
from dcgen.preview import fit_preview
from dcgen.solver import consistency, flow_dpmpp_2m

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
CHECKS = []


class Pretended(torch.Tensor):
    """A tensor that says it is on DEVICE; its values are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), 0, dtype=held.dtype, device=DEVICE)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes tensors that are asked for on DEVICE, as in torch.zeros(..., device=x.device)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """An operation: on DEVICE if it was asked for there, or has an input there and asks for no other place."""
    inside = []

    def unwrap(value):
        if isinstance(value, Pretended):
            inside.append(value)
            return value.held
        return torch.device("cpu") if value == DEVICE else value

    asked = kwargs.get("device")
    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if asked != DEVICE and (asked is not None or not inside):
        return result

    def wrap(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, Pretended):
            return value
        if value.dtype == torch.float64:
            raise RuntimeError(f"{func}: this device does not support float64")
        return Pretended(value)

    return tree_map(wrap, result)


def check(function):
    CHECKS.append(function)
    return function


def on_device(*shape, seed=0, low=-1.0):
    return torch.empty(*shape).uniform_(low, 1.0, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def moved(module):
    return {name: Pretended(tensor) for name, tensor in module.state_dict().items()}


def same(found, expected):
    assert found.device == DEVICE
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def refused(make):
    with pytest.raises(RuntimeError, match="float64"):
        make()


@check
def device():
    """It is one: it computes, and refuses float64 however that is asked for."""
    x = on_device(4)
    assert (x + x).device == torch.zeros(3, device=x.device).device == DEVICE
    assert x.cpu().device.type == "cpu"
    assert torch.equal((x * 2).cpu(), x.cpu() * 2)
    refused(x.double)
    refused(lambda: torch.zeros(3, dtype=torch.float64, device=x.device))
    refused(lambda: x + torch.ones(4, dtype=torch.float64))
    refused(lambda: x.cpu().double().to(DEVICE))


@check
def dpmpp_solver():
    x, sigmas = on_device(1, 2, 3, 3), torch.linspace(1, 0, 6)

    def denoise(x, sigma):
        return x * (1 - sigma)

    same(flow_dpmpp_2m(denoise, x, sigmas.to(DEVICE)), flow_dpmpp_2m(denoise, x.cpu(), sigmas))


@check
def consistency_solver():
    x, noise, sigmas = on_device(1, 2, 3, 3), on_device(1, 2, 3, 3, seed=1), torch.linspace(1, 0, 4)

    def denoise(x, sigma):
        return x * (1 - sigma)

    expected = consistency(denoise, x.cpu(), sigmas, noise=lambda _: noise.cpu())
    same(consistency(denoise, x, sigmas.to(DEVICE), noise=lambda _: noise), expected)


@check
def quality():
    first, second = common_part(on_device(1, 8, 8, 3, low=0.0), on_device(1, 6, 8, 3, seed=1, low=0.0))
    error = (first.cpu().double() - second.cpu().double()).square().mean().item()
    assert math.isclose(psnr(first, second), 10 * math.log10(1 / error), rel_tol=1e-9)


@check
def extraction():
    """A full and a randomised SVD, which leaves the generator as it was."""
    for rows, columns in ((12, 10), (400, 300)):
        delta = on_device(rows, 3, seed=1) @ on_device(3, columns, seed=2)
        before = torch.get_rng_state()
        pair, share = factor(delta, rank=3)
        assert share > 1 - 1e-6
        torch.testing.assert_close(pair.delta(), delta.cpu(), rtol=1e-3, atol=1e-4)
        assert torch.equal(torch.get_rng_state(), before)


@check
def preview_factors():
    space = LatentSpace("x", channels=5, spatial_factor=4, scaling_factor=0.5)
    images = [on_device(2, 3, 16, 16, seed=i) for i in range(3)]

    def encode(image):
        return torch.cat([image, image[:, :2] * 0.3], 1)[:, :, ::4, ::4]

    assert fit_preview(encode, space, images) == fit_preview(encode, space, [image.cpu() for image in images])


@check
def sana():
    """The whole network, with its sine-cosine positions, which are computed in float64."""
    config = SanaConfig(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, caption_channels=6, interpolation_scale=1.0,
    )  # fmt: skip
    network = SanaNet(config).eval()
    for parameter in network.parameters():
        parameter.normal_(std=0.2)
    inputs = on_device(1, 4, 4, 6), Pretended(torch.tensor([500.0])), on_device(1, 5, 6, seed=1)
    same(torch.func.functional_call(network, moved(network), inputs), network(*(value.cpu() for value in inputs)))


class Both(torch.nn.Module):
    """Encodes and decodes in strips."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.decode(self.model.encode(image, strip=1), strip=1)


@check
def autoencoder():
    few = {f"{side}_{name}": (size,) * 6 for side in ("encoder", "decoder")
           for name, size in (("block_out_channels", 32), ("layers_per_block", 1))}  # fmt: skip
    both = Both(DCAE(dataclasses.replace(VARIANTS["dc-ae-f32c32-sana-1.1"], **few)).eval())
    image = on_device(1, 3, 96, 64)
    same(torch.func.functional_call(both, moved(both), (image,)), both(image.cpu()))


def main():
    results = {}
    for function in CHECKS:
        try:
            with torch.no_grad(), Device():
                function()
            results[function.__name__] = ""
        except Exception:
            results[function.__name__] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

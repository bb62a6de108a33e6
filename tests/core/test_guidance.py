"""Eq. 2-7 against the formulas written out again in numpy float64, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgen import guidance


def _draw(seed: int, *shape: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape) for _ in range(3))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 4))
def test_formulas_in_float64(seed, batch):
    cond, uncond, _ = _draw(seed, batch, 3, 4, 5)
    w = np.random.default_rng(seed + 1).uniform(0, 13, batch)
    wide = w[:, None, None, None]
    cfg = cond + wide * (cond - uncond)
    raw = cond / (1 + wide) + uncond * (wide / (1 + wide))
    tensors = [torch.from_numpy(value) for value in (cond, uncond, w)]
    np.testing.assert_allclose(guidance.cfg_velocity(*tensors), cfg, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(guidance.raw_velocity(*tensors), raw, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), w=st.floats(0, 20))
def test_raw_velocity_undoes_cfg(seed, w):
    cond, uncond, _ = (torch.from_numpy(value) for value in _draw(seed, 2, 6))
    guided = guidance.cfg_velocity(cond, uncond, w)
    torch.testing.assert_close(guidance.raw_velocity(guided, uncond, w), cond, rtol=1e-9, atol=1e-9)


def test_no_guidance_is_the_identity():
    cond, uncond, _ = (torch.from_numpy(value) for value in _draw(7, 2, 6))
    assert torch.equal(guidance.cfg_velocity(cond, uncond, 0.0), cond)
    assert torch.equal(guidance.raw_velocity(cond, uncond, 0.0), cond)
    assert guidance.guidance_scale(2.5) == 3.5


def test_interpolation_is_the_papers_line():
    x0, noise, _ = (torch.from_numpy(value) for value in _draw(3, 3, 4, 2, 2))
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    found = guidance.interpolate(x0, noise, sigma)
    for i, t in enumerate((1 - sigma).tolist()):
        np.testing.assert_allclose(found[i], (1 - t) * noise[i] + t * x0[i], rtol=1e-12, atol=1e-12)
    # The paper's v_t = x1 - x0 with x1 the data is ours with the opposite sign; ours is the slope along sigma.
    step = torch.full((3,), 1e-6, dtype=torch.float64)
    slope = (guidance.interpolate(x0, noise, sigma + step) - found) / 1e-6
    torch.testing.assert_close(slope, guidance.velocity_target(x0, noise), rtol=1e-6, atol=1e-6)


def test_gradient_reaches_both_branches():
    cond, uncond, target = (torch.from_numpy(value) for value in _draw(5, 2, 6))
    cond.requires_grad_()
    uncond.requires_grad_()
    w = torch.tensor([0.5, 4.0], dtype=torch.float64)
    (guidance.raw_velocity(cond, uncond, w) - target).square().mean().backward()
    # d raw / d uncond = w * d raw / d cond, row by row.
    torch.testing.assert_close(uncond.grad, w[:, None] * cond.grad)
    assert cond.grad.abs().min() > 0


def test_one_w_for_each_sample():
    cond, uncond, _ = (torch.from_numpy(value) for value in _draw(1, 3, 5))
    with pytest.raises(ValueError, match="each of the 3 samples"):
        guidance.raw_velocity(cond, uncond, torch.ones(2))

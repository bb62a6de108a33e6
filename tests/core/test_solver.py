"""Samplers against diffusers' schedulers, driven by the same nonlinear velocity field."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dcgen.schedule import shift_ratio, sigmas, sprint_sigmas
from dcgen.solver import consistency, denoised, flow_dpmpp_2m

diffusers = pytest.importorskip("diffusers")


def field(x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """A smooth velocity that depends on place, level and neighbours: no solver is exact on it."""
    return (1.3 * x).tanh() + 0.4 * x.roll(1, -1) * math.cos(3 * float(sigma)) - 0.2 * float(sigma)


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 20, 28])
def test_flow_dpmpp_equals_diffusers(steps, shift):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    expected = noise(dtype=torch.float32)
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        expected = scheduler.step(field(expected, sigma), timestep, expected, return_dict=False)[0]
    levels = sigmas(steps, tokens=1024, channels=32, rule="static", shift=shift)
    seen = []
    found = flow_dpmpp_2m(
        lambda x, sigma: denoised(x, field(x, sigma), sigma),
        noise(dtype=torch.float32),
        levels,
        lambda i, x0, x: seen.append((i, x0.shape, x.shape)),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [i for i, _, _ in seen] == list(range(steps))


def test_flow_dpmpp_is_of_second_order():
    """Halving the step cuts the error to a quarter (order 1 would halve it), on a grid even in lambda."""
    exact = None
    errors = []
    for steps in (2048, 16, 32, 64):
        levels = torch.linspace(-3, 3, steps + 1, dtype=torch.float64).neg().sigmoid()
        found = flow_dpmpp_2m(lambda x, sigma: denoised(x, field(x, sigma), sigma), noise(), levels)
        if exact is None:
            exact = found
        else:
            errors.append((found - exact).norm().item())
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 3.3


def test_flow_dpmpp_starts_at_pure_noise():
    """sigma 1 has lambda = -inf: the first step must still be finite, and the second of order 1."""
    levels = torch.tensor([1.0, 0.6, 0.3, 0.0])
    found = flow_dpmpp_2m(lambda x, sigma: denoised(x, field(x, sigma), sigma), noise(dtype=torch.float32), levels)
    assert found.isfinite().all()
    perfect = noise(1, torch.float32)
    assert torch.allclose(flow_dpmpp_2m(lambda x, sigma: perfect, noise(dtype=torch.float32), levels), perfect)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_equals_the_sprint_pipeline(steps):
    """SanaSprintPipeline's loop (scaling of the input, recombination of the output, SCMScheduler), written out."""
    spread = 0.5  # the scheduler's sigma_data
    scheduler = diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=spread)
    middle = 1.3 if steps == 2 else None
    scheduler.set_timesteps(steps, max_timesteps=math.pi / 2, intermediate_timesteps=middle)
    x = noise(dtype=torch.float32) * spread
    clean = x
    for i, t in enumerate(scheduler.timesteps[:-1].double().tolist()):
        s = math.sin(t) / (math.cos(t) + math.sin(t))
        size = math.sqrt(s**2 + (1 - s) ** 2)
        scaled = x / spread * size
        out = ((1 - 2 * s) * scaled + (1 - 2 * s + 2 * s**2) * field(scaled, s)) / size * spread
        torch.manual_seed(i)
        x, clean = scheduler.step(out, timestep=t, sample=x, return_dict=False)
    draws = iter(range(steps))

    def fresh(like: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(next(draws))
        return torch.randn_like(like)

    start = noise(dtype=torch.float32)
    found = consistency(lambda x, sigma: denoised(x, field(x, sigma), sigma), start, sprint_sigmas(steps), fresh)
    torch.testing.assert_close(found, clean / spread, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_sprint_sigmas_are_the_pipelines(steps):
    """What SanaSprintPipeline makes of SCMScheduler's angles; its 1.5708 is 4e-6 more than pi/2."""
    scheduler = diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    angles = scheduler.timesteps.double()
    expected = (angles.sin() / (angles.sin() + angles.cos())).float()
    torch.testing.assert_close(sigmas(steps, tokens=1024, channels=32, rule="sprint"), expected, rtol=0, atol=1e-5)


def test_sprint_sigmas():
    # Asked for a shift, the rule is an even grid; at its own ratio, two steps of it are Sprint's.
    of = {"tokens": 1024, "channels": 32, "rule": "sprint"}
    assert sigmas(2, **of, shift=shift_ratio(**of)).tolist() == pytest.approx(sprint_sigmas(2).tolist())
    expected = math.sin(1.3) / (math.sin(1.3) + math.cos(1.3))
    assert sprint_sigmas(2).tolist() == pytest.approx([1.0, expected, 0.0])
    assert sprint_sigmas(1).tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="at least 1 step"):
        sprint_sigmas(0)

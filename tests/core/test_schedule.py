"""Schedules against the published tables, against diffusers' schedulers, and at their edges."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgen.schedule import Schedule, shift_ratio, shifted, sigmas

# 20 steps; four digits as published, so 1e-4 is the whole of their precision.
TABLES = {
    "FLUX 1K f32c32": (
        {"tokens": 1024, "channels": 32, "rule": "flux2"},
        "1 .9817 .9622 .9413 .9188 .8946 .8684 .8401 .8093 .7756 .7388 .6983 .6535 .6036 .5480 .4853 .4142 .3329 "
        ".2391 .1296 0",
    ),
    "FLUX 512 f32c32": (
        {"tokens": 256, "channels": 32, "rule": "flux2"},
        "1 .9641 .9272 .8891 .8498 .8093 .7674 .7242 .6796 .6335 .5858 .5364 .4853 .4323 .3774 .3204 .2612 .1997 "
        ".1358 .0693 0",
    ),
    "FLUX 4K f64c128": (
        {"tokens": 4096, "channels": 128, "rule": "flux"},
        "1 .9836 .9660 .9471 .9266 .9045 .8805 .8543 .8257 .7942 .7595 .7210 .6780 .6297 .5751 .5128 .4412 .3579 "
        ".2598 .1425 0",
    ),
    "FLUX 2K f64c128": (
        {"tokens": 1024, "channels": 128, "rule": "flux"},
        "1 .9727 .9441 .9141 .8825 .8492 .8142 .7771 .7380 .6965 .6525 .6057 .5559 .5027 .4459 .3849 .3195 .2489 "
        ".1726 .0899 0",
    ),
    "SANA 1K": (
        {"tokens": 1024, "channels": 32, "rule": "static", "shift": 3.0},
        ".9997 .9824 .9639 .9441 .9227 .8996 .8746 .8475 .8178 .7853 .7496 .7102 .6663 .6173 .5621 .4997 .4283 .3459 "
        ".2498 .1362 0",
    ),
    "SANA 4K": (
        {"tokens": 16384, "channels": 32, "rule": "static", "shift": 6.0},
        ".9998 .9911 .9816 .9712 .9598 .9472 .9331 .9174 .8998 .8798 .8569 .8305 .7997 .7634 .7197 .6664 .5997 .5140 "
        ".3997 .2398 0",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_published_tables(name):
    arguments, table = TABLES[name]
    expected = torch.tensor([float(value) for value in table.split()])
    assert (sigmas(20, **arguments) - expected).abs().max() <= 1e-4


def test_flux_equals_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    for steps, tokens in ((4, 256), (20, 1024), (28, 4096), (50, 3600)):
        grid = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=grid, mu=calculate_shift(tokens))
        found = sigmas(steps, tokens=tokens, channels=128, rule="flux")
        assert found.shape == (steps + 1,)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, scheduler.sigmas, atol=1e-6, rtol=1e-6)


def test_empirical_equals_the_pipelines_of_flux2():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for steps, tokens in ((4, 256), (4, 1024), (4, 4096), (4, 4300), (20, 4301), (50, 16384), (28, 3600)):
        grid = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=grid, mu=compute_empirical_mu(tokens, steps))
        found = sigmas(steps, tokens=tokens, channels=128, rule="empirical")
        torch.testing.assert_close(found, scheduler.sigmas, atol=1e-6, rtol=1e-6)
    at_50 = Schedule("empirical").ratio(tokens=4096, channels=128)
    assert math.log(at_50) == pytest.approx(compute_empirical_mu(4096, 50))
    assert math.log(at_50) == pytest.approx(2.02, abs=0.005)  # ComfyUI's constant


@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 14, 20])
def test_static_equals_diffusers_flow_sigmas(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    found = sigmas(steps, tokens=1024, channels=32, rule="static", shift=shift)
    torch.testing.assert_close(found, scheduler.sigmas, atol=1e-6, rtol=1e-6)


@settings(deadline=None)
@given(
    steps=st.integers(1, 100),
    tokens=st.integers(1, 20000),
    channels=st.sampled_from([4, 16, 32, 128]),
    rule=st.sampled_from(["flux", "flux2", "empirical"]),
)
def test_falls_from_one_to_zero(steps, tokens, channels, rule):
    found = sigmas(steps, tokens=tokens, channels=channels, rule=rule)
    assert found[0] == 1
    assert found[-1] == 0
    assert (found.diff() < 0).all()


@settings(deadline=None)
@given(sigma=st.floats(0.001, 1), mu=st.floats(-2, 3))
def test_both_forms_of_the_shift_agree(sigma, mu):
    other = math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))
    assert shifted(torch.tensor(sigma, dtype=torch.float64), math.exp(mu)).item() == pytest.approx(other, rel=1e-9)


def test_overrides():
    plain = {"tokens": 1024, "channels": 32}
    assert shift_ratio(**plain, rule="flux2", mu=1.15) == pytest.approx(math.exp(1.15))
    assert shift_ratio(**plain, rule="flux", shift=3.0) == 3.0
    assert shift_ratio(**plain, rule="flux2") == pytest.approx(math.exp(1.039721), rel=1e-6)
    assert sigmas(4, **plain, rule="static", shift=1.0, sigma_max=1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "karras"}, "use one of flux, flux2, empirical, static, sprint"),
        ({"rule": "static"}, "needs its shift"),
        ({"rule": "flux", "mu": 1.0, "shift": 2.0}, "not both"),
        ({"rule": "flux", "shift": 0.0}, "above 0"),
        ({"rule": "flux", "steps": 0}, "at least 1 step"),
        ({"rule": "flux", "tokens": 0}, "at least 1 token"),
        ({"rule": "flux", "sigma_max": 1.5}, "at most 1"),
    ],
)
def test_refusals(arguments, message):
    call = {"steps": 4, "tokens": 16, "channels": 32, **arguments}
    with pytest.raises(ValueError, match=message):
        sigmas(call.pop("steps"), **call)


# ---- what a diffusers scheduler_config.json says ---------------------------------------------------------------------


def config_of(scheduler) -> dict:
    """The config.json that diffusers writes for a scheduler."""
    return dict(scheduler.config)


def test_schnell_is_not_shifted_and_starts_at_one():
    """FLUX.1-schnell's config has a static shift of 1: the grid of FlowMatchEuler as FluxPipeline calls it."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    schedule = Schedule.from_scheduler_config(config_of(scheduler))
    assert schedule == Schedule("static", shift=1.0, sigma_max=1.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.25, 4, dtype=torch.float64).tolist())
    torch.testing.assert_close(schedule.sigmas(4, tokens=4096, channels=64), scheduler.sigmas, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("numbers", [{"base_shift": 0.4}, {"max_shift": 0.9}, {"max_image_seq_len": 8192}])
def test_dynamic_shifting_with_other_numbers_than_flux(numbers):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    known = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **numbers)
    schedule = Schedule.from_scheduler_config(config_of(scheduler))
    of = {**known, **numbers}
    mu = calculate_shift(1024, of["base_image_seq_len"], of["max_image_seq_len"], of["base_shift"], of["max_shift"])
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 0.1, 10, dtype=torch.float64).tolist(), mu=mu)
    torch.testing.assert_close(schedule.sigmas(10, tokens=1024, channels=64), scheduler.sigmas, atol=1e-6, rtol=1e-6)


def test_what_a_config_leaves_to_the_model():
    """FLUX.1's own numbers, which the published f32 releases carry along; DDPM; an absent file."""
    diffusers = pytest.importorskip("diffusers")
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for config in (config_of(dynamic), config_of(diffusers.DDIMScheduler()), {}):
        assert Schedule.from_scheduler_config(config) is None


def test_flow_sigmas_of_a_config():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    assert Schedule.from_scheduler_config(config_of(scheduler)) == Schedule("static", shift=3.0)


@pytest.mark.parametrize("config", [{"time_shift_type": "linear"}, {"shift_terminal": 0.02}])
def test_a_shift_that_is_not_known_is_refused(config):
    with pytest.raises(ValueError, match="not known here"):
        Schedule.from_scheduler_config({"use_dynamic_shifting": True, **config})


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule("flux"),
        Schedule("flux", base_shift=0.4, max_image_seq_len=8192),
        Schedule("flux2", mu=0.7),
        Schedule("static", shift=6.0),
        Schedule("static", shift=1.0, sigma_max=1.0),
        Schedule("sprint"),
    ],
)
def test_a_schedule_goes_through_json(schedule):
    stored = json.loads(json.dumps(schedule.to_dict()))
    assert Schedule.parse(stored) == schedule
    assert Schedule.from_scheduler_config({"use_dynamic_shifting": True, "_dcgen_schedule": stored}) == schedule
    assert "rule" in stored
    assert schedule == stored
    assert hash(schedule) == hash(Schedule.parse(stored))
    direct = sigmas(7, tokens=1024, channels=32, **schedule)
    assert torch.equal(direct, schedule.sigmas(7, tokens=1024, channels=32))
    assert len(stored) < 4, "defaults are not written: an older reader knows three fields"


def test_a_misspelt_rule_is_refused_where_it_is_read():
    with pytest.raises(ValueError, match=r"schedule must be .*rul"):
        Schedule.parse({"rul": "flx"})

"""Drawing with a release in the type that a recipe names."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch

from dcgen.folder import SCHEDULER
from dcgen.schedule import Schedule
from train.config import load_recipe
from train.distributed import Ranks
from train.generate import Pipeline
from train.run import make_stage
from train.sample import dpm_solver, euler, solver_of


@pytest.mark.parametrize("name", ["debug_run", "debug_sana", "debug_dit"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_bfloat16_network_has_the_velocity_of_float32_to_its_rounding(name, moved, request):
    run = request.getfixturevalue(name)
    adapter = {"adapter": run / "finetune" / "adapter.safetensors", "autoencoder": run / "tiny" / "dc-ae"}
    both = [
        Pipeline(run / "tiny" / "release", dtype=dtype, text_tokens=8, **(adapter if moved else {}))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    space = both[0].autoencoder.space
    side = 4 if moved else 16
    x = torch.randn(3, space.channels, side, side, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.02, 0.5, 0.985])
    captions = ["a red square on the left", "a blue square on the right", "a green square on the left"]
    exact, rounded = (p.velocity(x, sigma, p.text(captions), torch.tensor([1.0, 3.5, 7.0])) for p in both)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 0.05, error
    images = [p.images(["a red square on the left"], [0], 64, 64, steps=2, guidance=3.5) for p in both]
    assert (images[0] - images[1]).square().mean().sqrt() < 0.1


@pytest.mark.parametrize(("steps", "shift"), [(20, 3.0), (5, 3.0), (2, 1.0), (20, 6.0)])
def test_dpm_solver_is_the_scheduler_of_diffusers(steps, shift):
    """SANA's scheduler_config.json, on a velocity that bends."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(steps)
    sigmas = Schedule("static", shift=shift).sigmas(steps, tokens=1, channels=1)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-5, atol=1e-6)

    def velocity(x, sigma, cond, scale):
        level = sigma[:, None, None, None]
        return torch.sin(3 * x + level) + level.square() * x

    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    expected = noise
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        v = velocity(expected, sigma.expand(2), {}, None)
        expected = scheduler.step(v, time, expected, return_dict=False)[0]
    found = dpm_solver(velocity, noise, sigmas, {})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ((euler(velocity, noise, sigmas, {}) - expected).abs().max() > 1e-2) == (steps > 2)


def test_dpm_solver_begins_at_pure_noise_with_its_first_order_step():
    calls = []

    def velocity(x, sigma, cond, scale):
        calls.append(float(sigma[0]))
        return x - 2.0  # x0 = x - sigma v

    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    middle = 0.5 * noise + 0.5 * 2.0  # x0 = 2 at sigma 1
    torch.testing.assert_close(dpm_solver(velocity, noise, sigmas, {}), middle - 0.5 * (middle - 2.0))
    assert calls == [1.0, 0.5]


def test_the_solver_of_a_release_is_the_one_that_its_scheduler_names(debug_run, debug_sana, debug_dit, tmp_path):
    assert solver_of(debug_run / "tiny" / "release") == "euler"
    assert solver_of(debug_sana / "tiny" / "release") == "dpm-solver++"
    with pytest.raises(ValueError, match=r"scheduler_config\.json: 'DDIMScheduler' .* name one of euler"):
        solver_of(debug_dit / "tiny" / "release")
    other = shutil.copytree(debug_sana / "tiny" / "release", tmp_path / "other")
    config = json.loads((other / SCHEDULER).read_text())
    (other / SCHEDULER).write_text(json.dumps({**config, "solver_order": 3}))
    stage = make_stage(
        load_recipe("synthetic-sana", [f"synthesize.base={other}", f"synthesize.prompts={__file__}"]),
        "synthesize",
        Ranks(0, 1, torch.device("cpu")),
    )
    assert [problem for problem in stage.check() if "DPMSolverMultistepScheduler" in problem]


def test_data_for_sana_is_drawn_by_its_own_solver(debug_sana):
    """As SanaPipeline would, but for the schedule's float32 sigmas: same steps, true CFG."""
    release = debug_sana / "tiny" / "release"
    pipeline = Pipeline(release, text_tokens=8)
    how = {"steps": 6, "guidance": 4.5, "cfg_w": 3.5}
    found = pipeline.latents(["a red square"], [3], 64, 64, **how, solver="dpm-solver++")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(release / "scheduler")
    scheduler.set_timesteps(6)
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    cond, empty = pipeline.text(["a red square"]), pipeline.text([""])
    with torch.no_grad():
        for time in scheduler.timesteps:
            given = {"hidden_states": x, "timestep": time.expand(1), "return_dict": False}
            v, u = (
                pipeline.model(encoder_hidden_states=c["prompt_embeds"], encoder_attention_mask=c["mask"], **given)[0]
                for c in (cond, empty)
            )
            x = scheduler.step(u + 4.5 * (v - u), time, x, return_dict=False)[0]
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)
    assert (pipeline.latents(["a red square"], [3], 64, 64, **how) - x).abs().max() > 1e-2


def test_the_recipes_draw_by_the_solver_of_their_base():
    for name in ("synthetic-flux", "synthetic-sana"):
        assert load_recipe(name).stages["synthesize"].solver == "as base"

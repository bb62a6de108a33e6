"""The schedule in a release: what is written is what is read, by us and, as far as it has such fields, by diffusers."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch

from dcgen.folder import SCHEDULER, read_release
from dcgen.schedule import SCHEDULE_KEY, Schedule
from train.config import load_recipe
from train.distributed import Ranks
from train.generate import Pipeline
from train.release import write_scheduler
from train.run import make_stage

SCHEDULES = [
    Schedule("flux"),
    Schedule("flux", base_shift=0.3, max_shift=2.0, base_image_seq_len=64, max_image_seq_len=1024),
    Schedule("flux", shift=2.5),
    Schedule("flux", mu=0.7),
    Schedule("flux2"),
    Schedule("flux2", mu=-0.5),
    Schedule("static", shift=3.0),
    Schedule("static", shift=1.0, sigma_max=1.0),
    Schedule("static", mu=1.2, sigma_max=0.98),
    Schedule("sprint"),
]
BASES = {
    "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": True, "base_shift": 0.4, "shift": 3.0},
    "DPMSolverMultistepScheduler": {
        "flow_shift": 2.0,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    },
    "DDIMScheduler": {"beta_start": 1e-4, "beta_end": 0.02},
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_is_read_back_as_it_was_written(schedule, kind, tmp_path):
    getattr(diffusers, kind)(**BASES[kind]).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    for written in (Schedule("static", shift=9.0), schedule):  # over that of an earlier step, too
        write_scheduler(path, written)
    config = json.loads(path.read_text())
    assert Schedule.from_scheduler_config(config) == schedule
    getattr(diffusers, kind).from_pretrained(tmp_path)
    # what diffusers sees, without our own field, has the same shift wherever it has fields for it
    config.pop(SCHEDULE_KEY)
    alone = Schedule.from_scheduler_config(config) or Schedule("flux")
    if kind == "FlowMatchEulerDiscreteScheduler" and schedule.rule in ("flux", "static"):
        sizes = [{"tokens": tokens, "channels": 16} for tokens in (256, 1024, 4096)]
        assert [alone.ratio(**s) for s in sizes] == pytest.approx([schedule.ratio(**s) for s in sizes])


@pytest.fixture
def release(debug_run, tmp_path):
    """A copy of the debug run's base, to write another scheduler into."""
    return shutil.copytree(debug_run / "tiny" / "release", tmp_path / "release")


@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"shift": 1.0}, Schedule("static", shift=1.0, sigma_max=1.0)),  # FLUX.1-schnell
        ({"use_dynamic_shifting": True}, Schedule("flux")),
        ({"use_dynamic_shifting": True, "max_shift": 2.0}, Schedule("flux", max_shift=2.0)),
    ],
)
def test_a_base_is_drawn_by_its_own_scheduler(release, settings, schedule):
    diffusers.FlowMatchEulerDiscreteScheduler(**settings).save_pretrained(release / "scheduler")
    assert read_release(release).schedule == schedule
    pipeline = Pipeline(release)
    assert pipeline.schedule == schedule
    # and as diffusers' own scheduler has its levels
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(release / "scheduler")
    tokens, steps = pipeline.tokens(64, 64), 5
    grid = [1 - k / steps for k in range(steps)]
    dynamic = {"mu": torch.log(torch.tensor(schedule.ratio(tokens=tokens, channels=4))).item()}
    scheduler.set_timesteps(sigmas=grid, **(dynamic if settings.get("use_dynamic_shifting") else {}))
    found = pipeline.schedule.sigmas(steps, tokens=tokens, channels=4)
    torch.testing.assert_close(found, scheduler.sigmas, rtol=1e-5, atol=1e-6)


def test_a_pretrained_base_is_previewed_by_its_own_scheduler(release, debug_run, tmp_path):
    from train.config import parse_recipe

    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5).save_pretrained(release / "scheduler")
    stages = {"pretrain": {"base": str(release), "cache": str(debug_run / "cache"), "steps": 1, "autocast": False}}
    recipe = parse_recipe({"name": "x", "output": str(tmp_path / "run"), "device": "cpu", "stages": stages})
    stage = make_stage(recipe, "pretrain", Ranks(0, 1, torch.device("cpu")))
    stage.setup()
    assert stage.schedule == Schedule("static", shift=1.5, sigma_max=1.0)


def test_a_scheduler_that_cannot_be_followed_is_refused_before_training(release, tmp_path):
    config = json.loads((release / SCHEDULER).read_text())
    (release / SCHEDULER).write_text(json.dumps({**config, "shift_terminal": 0.02}))
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", f"defaults.base={release}"])
    problems = make_stage(recipe, "finetune", Ranks(0, 1, torch.device("cpu"))).check()
    assert any("scheduler_config.json" in problem and "shift_terminal" in problem for problem in problems)

"""The closed-form head: no head has a smaller loss on the batches that it was fitted to."""

from __future__ import annotations

import pytest
import torch

from train.batches import BatchPlan
from train.config import load_recipe
from train.distributed import Ranks
from train.run import make_stage
from train.stages import head as module

CPU = Ranks(0, 1, torch.device("cpu"))
RUNS = {
    "flux": ("debug", "debug_run"),
    "flux2": ("debug-klein", "debug_klein"),
    "zimage": ("debug-zimage", "debug_zimage"),
    "sana": ("debug-sana", "debug_sana"),
    "dit": ("debug-dit", "debug_dit"),
}


def stage_of(recipe, run, out, *more):
    inputs = [f"output={out}", f"defaults.base={run}/tiny/release", f"head.cache={run}/cache"]
    inputs += [f"head.start={run}/align", f"defaults.autoencoder={run}/tiny/dc-ae", "head.head_init=closed-form"]
    return make_stage(load_recipe(recipe, [*inputs, *more]), "head", CPU)


def losses(stage):
    """The noise or velocity error of the stage's own loss, mean over the batches that the head was fitted to."""
    plan = BatchPlan(stage.buckets(), stage.config.batch, stage.context.recipe.seed)
    total = torch.zeros(())
    for step in range(module.FIT_BATCHES):
        (batch,) = plan.micro_batches(step, rank=0, world=1, accumulate=1, device=CPU.device)
        loss, metrics = stage.loss(batch)
        total = total + loss - metrics.get("bound", 0)
    return total / module.FIT_BATCHES


@pytest.mark.parametrize("backbone", RUNS)
def test_the_gradient_of_the_loss_is_zero_there(backbone, request, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIT_BATCHES", 6)
    recipe, run = RUNS[backbone]
    stage = stage_of(recipe, request.getfixturevalue(run), tmp_path)
    stage.setup()
    head = stage.model.get_submodule(stage.ends.head)
    named = stage.space.channels  # DiT's head also gives a variance, which the bound trains and the fit leaves at 0
    loss = losses(stage)
    assert loss.item() == pytest.approx(stage.fitted["closed_form_loss"], rel=1e-4)
    assert loss.item() < 0.98 * stage.fitted["variance"]
    loss.backward()
    at_minimum = head.weight.grad[:named].norm().item()
    head.weight.grad = None
    torch.nn.init.xavier_uniform_(head.weight)
    away = losses(stage)
    away.backward()
    assert away.item() > loss.item()
    assert at_minimum < 1e-3 * head.weight.grad[:named].norm().item()


def test_what_is_not_linear_in_the_head_is_refused(debug_run, debug_dit, tmp_path):
    assert "patch_size 1, not 2" in stage_of("debug", debug_run, tmp_path, "head.patch_size=2").check()[0]
    problems = stage_of("debug-dit", debug_dit, tmp_path, "head.objective.loss=flow").check()
    assert "is for objective.loss: ddpm" in problems[0]

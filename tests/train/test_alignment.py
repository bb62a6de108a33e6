"""Eq. 1: closed form against lstsq on the full matrix, AdamW, and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.alignment import LinearEmbedder, NormalEquations, alignment_loss, resample_pair
from train.families import FAMILIES

FLUX = FAMILIES["flux"]


class Embedder(nn.Module):
    """A network as far as Eq. 1 sees it."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.x_embedder = nn.Linear(inputs, width)


def problem(seed: int, rows: int = 3, channels: int = 5, width: int = 7, patch: int = 1):
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(rows, 6 * patch, 4 * patch, width, generator=g, dtype=torch.float64)
    latents = torch.randn(rows, channels, 3 * patch, 2 * patch, generator=g, dtype=torch.float64)
    return teacher, latents


def pixels(latents: torch.Tensor) -> torch.Tensor:
    return latents.movedim(1, -1)


@pytest.mark.parametrize("resample", ["teacher-down", "student-up"])
@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_lstsq_on_the_full_matrix(resample, seed):
    teacher, latents = problem(seed, rows=6)
    target, features = resample_pair(teacher, pixels(latents), resample)
    matrix = torch.cat([features.reshape(-1, 5), torch.ones(features.numel() // 5, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(matrix, target.reshape(-1, 7)).solution
    equations = NormalEquations.empty(5, 7)
    for part in range(3):  # in parts, as ranks and batches do it
        rows = slice(2 * part, 2 * part + 2)
        equations.add(*reversed(resample_pair(teacher[rows], pixels(latents)[rows], resample)))
    weight, bias = equations.solve()
    torch.testing.assert_close(weight, expected[:-1].T, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(bias, expected[-1], rtol=1e-9, atol=1e-10)
    residual = (matrix @ expected - target.reshape(-1, 7)).square().mean()
    assert equations.loss(weight, bias) == pytest.approx(residual.item(), rel=1e-9)
    assert equations.variance() == pytest.approx(target.reshape(-1, 7).var(0, correction=0).mean().item(), rel=1e-9)


def test_a_dead_channel_gets_no_weight():
    teacher, latents = problem(0)
    latents[:, 2] = 0
    equations = NormalEquations.empty(5, 7)
    equations.add(*reversed(resample_pair(teacher, pixels(latents), "teacher-down")))
    weight, bias = equations.solve()
    assert weight[:, 2].abs().max() == 0
    assert torch.isfinite(weight).all()
    perturbed = equations.loss(weight + 1e-3 * torch.randn_like(weight), bias)
    assert equations.loss(weight, bias) <= perturbed


def test_badly_scaled_channels_are_solved_too():
    teacher, latents = problem(1)
    scales = torch.tensor([1e-4, 1.0, 1e4, 1e-2, 10.0], dtype=torch.float64)
    plain, scaled = NormalEquations.empty(5, 7), NormalEquations.empty(5, 7)
    target, features = resample_pair(teacher, pixels(latents), "teacher-down")
    plain.add(features, target)
    scaled.add(features * scales, target)
    weight, bias = plain.solve()
    found, other = scaled.solve()
    torch.testing.assert_close(found * scales, weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other, bias, rtol=1e-6, atol=1e-9)


def test_ridge_shrinks_and_never_beats_the_least():
    teacher, latents = problem(2)
    equations = NormalEquations.empty(5, 7)
    equations.add(*reversed(resample_pair(teacher, pixels(latents), "teacher-down")))
    free, shrunk = equations.solve(), equations.solve(ridge=0.5)
    assert shrunk[0].norm() < free[0].norm()
    assert equations.loss(*shrunk) > equations.loss(*free)


def test_gradient_is_zero_at_the_closed_form_and_points_there_elsewhere():
    teacher, latents = problem(3)
    equations = NormalEquations.empty(5, 7)
    equations.add(*reversed(resample_pair(teacher, pixels(latents), "student-up")))
    weight, bias = (t.clone().requires_grad_() for t in equations.solve())
    loss = alignment_loss(teacher, pixels(latents) @ weight.T + bias, "student-up")
    loss.backward()
    assert weight.grad.abs().max() < 1e-12
    assert bias.grad.abs().max() < 1e-12
    away = torch.zeros_like(weight, requires_grad=True)
    alignment_loss(teacher, pixels(latents) @ away.T, "student-up").backward()
    assert away.grad.abs().max() > 1e-3


@pytest.mark.parametrize("patch", [1, 2])
def test_the_linear_view_of_an_embedder_is_the_embedder(patch):
    torch.manual_seed(patch)
    model = Embedder(5 * patch * patch, 7)
    config = {"in_channels": 5 * patch * patch}
    _, latents = problem(4, patch=patch)
    latents = latents.float()
    linear = LinearEmbedder(FLUX, model, config, patch)
    weight, bias = linear.flat()
    found = linear.features(latents) @ weight.T + bias + linear.offset(latents)
    torch.testing.assert_close(found, FLUX.embed(model, latents, config), rtol=1e-5, atol=1e-6)


def test_pooling_is_the_mean_over_the_token_block():
    teacher, latents = problem(5)
    target, _ = resample_pair(teacher, pixels(latents), "teacher-down")
    torch.testing.assert_close(target[1, 2, 1], teacher[1, 4:6, 2:4].mean((0, 1)))


def test_grids_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        resample_pair(torch.zeros(1, 5, 4, 2), torch.zeros(1, 3, 2, 2), "teacher-down")


@pytest.mark.parametrize("solver", ["closed-form", "adamw"])
def test_stage_reports_the_least_loss(debug_run, tmp_path, solver):
    import json

    from train.config import load_recipe
    from train.run import run_recipe

    overrides = [f"output={tmp_path}", f"align.cache={debug_run}/cache", f"align.base={debug_run}/tiny/release"]
    overrides += [f"align.solver={solver}", "align.steps=400", "align.batch=8", "align.optimizer={lr: 0.02}"]
    overrides += ["align.checkpoint_every=1000"]
    numbers = run_recipe(load_recipe("debug", overrides), only="align")["align"]
    on_disk = json.loads((tmp_path / "align" / "report.json").read_text())
    assert on_disk["loss"] == numbers["loss"]
    assert 0 < numbers["least_loss"] < numbers["variance"]
    # weights are stored in float32
    assert numbers["loss"] >= numbers["least_loss"] * (1 - 1e-9)
    limit = 1e-6 if solver == "closed-form" else 0.2
    assert numbers["loss"] <= numbers["least_loss"] * (1 + limit)

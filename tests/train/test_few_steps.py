"""Stage few-steps: its target by hand, what it trains, and the file that any LoRA loader takes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.few_steps import add_lora
from train.batches import BatchPlan
from train.config import load_recipe, parse_recipe
from train.distributed import Ranks
from train.generate import Pipeline
from train.run import dry_run, make_stage, run_recipe

CPU = Ranks(0, 1, torch.device("cpu"))


def recipe(run, out, name="debug", **fields):
    """A few-steps stage over the release that a debug run exported."""
    release = run / "export" / "release"
    both = {"base": str(release), "autoencoder": str(release / "vae")}
    data = {"type": "folder", "path": str(run / "tiny" / "pictures"), "pixels": 64, "multiple": 16}
    cache = {**both, "data": data, "batch": 4, "store": "float32", "text_tokens": 8}
    stage = {**both, "steps": 3, "batch": 4, "rank": 4, "alpha": 8, "few": 2, "teacher_steps": 6, "g": [2.0, 5.0]}
    stage |= {"schedule": {"rule": "static", "shift": 3.0}, "optimizer": {"lr": 0.1, "warmup": 0}, "ema": 0.1, **fields}
    return parse_recipe({"name": name, "output": str(out), "stages": {"cache": cache, "few-steps": stage}})


@pytest.fixture(params=["debug_run", "debug_sana"])
def made(request, tmp_path):
    """(recipe, stage set up on its cache, the same release to draw with): a distilled base and one with true CFG."""
    folder = request.getfixturevalue(request.param)
    built = recipe(folder, tmp_path)
    run_recipe(built, only="cache")
    stage = make_stage(built, "few-steps", CPU)
    stage.setup()
    return built, stage, Pipeline(folder / "export" / "release", text_tokens=8)


def test_the_target_is_where_the_base_goes_in_its_own_steps(made):
    _, stage, pipeline = made
    for name, parameter in stage.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    (batch,) = BatchPlan(stage.buckets(), 4, 0).micro_batches(2, rank=0, world=1, accumulate=1, device=CPU.device)
    found, _ = stage.loss(batch)
    x0, cond = stage.samples(batch)
    grid = torch.arange(6, -1, -1, dtype=torch.float64) / 6 * 0.999
    sigmas = (3 * grid / (1 + 2 * grid)).float()
    interval, noise = batch.integers("interval", 2), batch.normal("noise", x0.shape[1:])
    g = 2 + 3 * batch.uniform("g")
    errors = []
    with torch.no_grad():
        for row in range(4):
            own = {name: value[row : row + 1] for name, value in cond.items()}
            k, scale = 3 * int(interval[row]), g[row : row + 1]
            begin = (1 - sigmas[k]) * x0[row : row + 1] + sigmas[k] * noise[row : row + 1]
            x = begin
            for step in range(k, k + 3):
                v = pipeline.velocity(x, sigmas[step : step + 1], own, scale)
                if not pipeline.distilled:
                    u = pipeline.velocity(x, sigmas[step : step + 1], stage.empty, None)
                    v = u + scale * (v - u)
                x = x + (sigmas[step + 1] - sigmas[step]) * v
            student = stage.velocity(begin, sigmas[k : k + 1], own, scale if pipeline.distilled else None)
            errors.append((student - (x - begin) / (sigmas[k + 3] - sigmas[k])).square().mean())
    assert found.item() == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3)
    assert {interval.min().item(), interval.max().item()} == {0, 1}


def test_the_lora_alone_trains_and_its_file_has_the_velocity_of_training(made):
    built, stage, pipeline = made
    run_recipe(built)
    assert all(".lora_" in name for name, p in stage.model.named_parameters() if p.requires_grad)
    file = stage.folder / "lora.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["dcgen.steps"] == "2"
    layers = {name.rpartition(".lora_A")[0] for name in tensors if "lora_A" in name}
    assert layers == {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    assert all(name.startswith("transformer.") for name in layers)
    parameters = dict(stage.model.named_parameters())
    for name, tensor in tensors.items():
        if not name.endswith(".alpha"):
            place = name.removeprefix("transformer.").replace(".weight", ".default.weight")
            parameters[place].data.copy_(tensor)
    space = pipeline.autoencoder.space
    x = torch.randn(2, space.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    call = (x, torch.tensor([0.4, 0.9]), pipeline.text(["a red square", "a blue square"]), torch.tensor([2.0, 4.0]))
    with torch.no_grad():
        wanted = stage.velocity(*call[:3], call[3] if pipeline.distilled else None)
        before = pipeline.velocity(*call)
        add_lora(pipeline.model, file)
        found = pipeline.velocity(*call)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (before - wanted).norm() / wanted.norm() > 1e-3


def test_settings_that_cannot_be(debug_run, tmp_path):
    stage = make_stage(recipe(debug_run, tmp_path, teacher_steps=7, compile=True), "few-steps", CPU)
    problems = "\n".join(stage.check())
    assert "teacher_steps: 7 is no multiple of few: 2" in problems
    assert "set compile: false" in problems


def test_the_plan_of_the_4k_recipe(tmp_path, capsys):
    assert dry_run(load_recipe("flux-4k-4step", [f"output={tmp_path}"])) == 0
    out = capsys.readouterr().out
    assert "4 steps for 20: 5 passes without gradient a sample beside" in out
    assert "4096 -> 4096 tokens an image at 4096 px" in out

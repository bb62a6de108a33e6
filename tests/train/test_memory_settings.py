"""Settings that save time or memory: what they compute is what is computed without them."""

from __future__ import annotations

import pytest
import torch

from train.batches import BatchPlan
from train.config import load_recipe
from train.distributed import Ranks
from train.run import make_stage

CPU = Ranks(0, 1, torch.device("cpu"))
SHORT = ["finetune.preview_every=0", "finetune.dtype=bfloat16"]


def step(run, name, *overrides, steps=2):
    """(losses, gradients by parameter) of the fine-tuning stage of a finished debug run, in a few steps."""
    recipe = load_recipe(name, [f"output={run}", *SHORT, *overrides])
    stage = make_stage(recipe, "finetune", CPU)
    module = stage.setup()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in module.named_parameters():
        if ".lora_B." in parameter_name:  # which begin at zero, so that half of the gradients would be
            parameter.data.normal_(std=0.05, generator=generator)
    plan, losses = BatchPlan(stage.buckets(), 4, 0), []
    for number in range(steps):
        for batch in plan.micro_batches(number, rank=0, world=1, accumulate=1, device=CPU.device):
            loss, _ = stage.loss(batch)
            loss.backward()
            losses.append(loss.item())
    return losses, {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def distance(found, expected):
    """Largest relative distance of a gradient, and of the losses."""
    (losses, gradients), (plain_losses, plain) = found, expected
    assert gradients.keys() == plain.keys()
    apart = max(((gradients[name] - value).norm() / (value.norm() + 1e-9)).item() for name, value in plain.items())
    return max(apart, *(abs(a / b - 1) for a, b in zip(losses, plain_losses, strict=True)))


@pytest.fixture(params=[("debug_run", "debug"), ("debug_sana", "debug-sana"), ("debug_dit", "debug-dit")])
def debug(request):
    """Folder and name of a finished run of each family."""
    return request.getfixturevalue(request.param[0]), request.param[1]


def test_compiled_blocks_have_the_gradients_of_plain_ones(debug):
    """With recomputation, and for FLUX with another number of rows in each call."""
    torch._dynamo.reset()
    common = ["finetune.gradient_checkpointing=true", "finetune.objective.caption_dropout=0.5"]
    steps = 2 if debug[1] == "debug" else 1
    compiled = step(*debug, *common, "finetune.compile=true", "finetune.compile_backend=aot_eager", steps=steps)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0
    assert distance(compiled, step(*debug, *common, steps=steps)) < 0.02  # bfloat16 sums in another order


def test_growing_alpha_is_not_compiled(debug_run):
    recipe = load_recipe("debug", [f"output={debug_run}", "finetune.compile=true", "finetune.alpha_warmup=3"])
    assert [p for p in make_stage(recipe, "finetune", CPU).check() if "set compile: false" in p]


def test_lora_without_casts_has_the_bits_of_lora_with_them(debug_run, monkeypatch):
    from train.stages import finetune

    found = step(debug_run, "debug")
    inject = finetune.inject_lora

    def with_casts(model, *arguments):
        inject(model, *arguments)
        for layer in model.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                layer.cast_input_dtype_enabled = True

    monkeypatch.setattr(finetune, "inject_lora", with_casts)
    expected = step(debug_run, "debug")
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())

"""--dry-run: counts against published parameter numbers, and what does not fit is refused with what would."""

from __future__ import annotations

import re

import pytest
import torch

from train.config import list_recipes, load_recipe
from train.distributed import Ranks
from train.plan import count, geometry, network
from train.run import dry_run, make_stage

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_passes_a_dry_run(name, tmp_path, capsys):
    recipe = load_recipe(name, [f"output={tmp_path}"])
    assert dry_run(recipe) == 0
    out = capsys.readouterr().out
    for stage in recipe.stages:
        assert f"\n{stage} (" in out
    assert not list(tmp_path.iterdir())


# Published totals: facts of the model cards, counted by the authors of this pack's facts on diffusers' own classes.
@pytest.mark.parametrize(
    ("recipe", "total"),
    [
        ("flux-512", 11_901_211_680),
        ("flux-2k", 11_901_801_600),
        ("sana-1.6b", 1_605_072_128),
        ("sana-4.8b", 4_722_256_128),
        ("dit-xl-512", 749_881_792),
    ],
)
def test_parameter_totals_are_the_published_ones(recipe, total):
    stage = make_stage(load_recipe(recipe), "finetune", CPU)
    cache = stage.context.recipe.stages["cache"]
    geo = geometry(stage.context, stage.config.base, cache.autoencoder, stage.config.architecture, 1)
    assert count(geo, 256).total == total


def test_lora_count_is_what_peft_makes():
    from train.lora import inject_lora

    stage = make_stage(load_recipe("flux-512"), "finetune", CPU)
    cache = stage.context.recipe.stages["cache"]
    geo = geometry(stage.context, stage.config.base, cache.autoencoder, stage.config.architecture, 1)
    small = {**geo.moved, "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    small |= {"axes_dims_rope": (4, 6, 6)}
    import dataclasses

    counted = count(dataclasses.replace(geo, config=small), 8)
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_config(geo.backbone.config_with_latent(small, 32, 1))
    inject_lora(model, geo.family, 8, 8.0, seed=0)
    assert counted.lora == sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert network(geo.family, geo.moved).x_embedder.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.accumulate=1", "memory_gb=60"], r"set accumulate: 32"),
        (["finetune.gradient_checkpointing=false", "memory_gb=80"], r"set gradient_checkpointing: true"),
        (["memory_gb=40", "finetune.accumulate=32"], r"set shard: 0"),
        (["memory_gb=2"], r"no setting here makes it fit"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting_that_would(overrides, words, capsys):
    assert dry_run(load_recipe("flux-1k", overrides)) == 1
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  refused: ")]
    assert len(refused) == 1
    assert re.search(words, refused[0]), refused


def test_dry_run_says_what_is_not_there_yet(capsys):
    dry_run(load_recipe("flux-4k"))
    out = capsys.readouterr().out
    assert "4096 tokens an image at 4096 px" in out
    assert "needed before it runs: runs/flux-2k/export/release/transformer not found" in out

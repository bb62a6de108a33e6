"""Every recipe of a published result takes a real step on a narrow model of its architecture."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest

from dcgen.adapter import load_adapter
from train.config import list_recipes, load_recipe, parse_recipe
from train.run import dry_run, run_recipe

SEVERAL_STEPS = ("flux-1k", "flux-2k", "flux-4k")
PUBLISHED = [name for name in list_recipes() if name.startswith(("flux-", "sana-", "dit-")) and "step" not in name]


@pytest.fixture(scope="module")
def releases(debug_run, debug_klein, debug_zimage, debug_sana, debug_dit):
    """Narrow releases by the first word of a recipe: a base, one on the new latent already, and the new autoencoder."""
    runs = {"flux": debug_run, "klein": debug_klein, "sana": debug_sana, "dit": debug_dit}
    runs |= {"z": debug_zimage, "zimage": debug_zimage}
    parts = {"base": "tiny/release", "moved": "export/release", "autoencoder": "tiny/dc-ae"}
    return {backbone: {part: run / path for part, path in parts.items()} for backbone, run in runs.items()}


SEVERAL_STEPS += ("klein-4k",)
UNPUBLISHED = [name for name in list_recipes() if name.startswith(("klein-", "z-image-"))]


@pytest.mark.parametrize("name", [*PUBLISHED, *UNPUBLISHED])
def test_one_step_of_every_stage(name, releases, debug_run, tmp_path):
    narrow = releases[name.split("-")[0]]
    published = load_recipe(name)
    stages = {}
    for stage, config in published.stages.items():
        fields = config.model_dump(mode="json")
        fields |= {"shard": 0}
        if config.kind == "cache":
            data = {"type": "folder", "path": str(debug_run / "tiny" / "pictures"), "pixels": 64, "multiple": 16}
            fields |= {"data": data, "batch": 4, "text_tokens": 8, "store": "float32"}
        if config.kind in ("head", "finetune"):
            fields |= {"steps": 1, "batch": 4, "accumulate": 2, "checkpoint_every": 1}
        if config.kind == "finetune":
            fields |= {"rank": 2, "alpha": 2}
        keeps_ends = "align" not in published.stages
        base = narrow["moved"] if keeps_ends else narrow["base"]
        autoencoder = narrow["moved"] / "vae" if keeps_ends else narrow["autoencoder"]
        for key, value in (("base", base), ("autoencoder", autoencoder)):
            if key in fields:
                fields[key] = str(value)
        if fields.get("original"):
            fields["original"] = str(narrow["base"])
        stages[stage] = fields
    numbers = run_recipe(parse_recipe({"name": name, "output": str(tmp_path), "stages": stages}))
    adapter = load_adapter(tmp_path / "export" / f"{name}.safetensors")
    assert adapter.lora
    assert (tmp_path / "export" / f"{name}-over-original.safetensors").is_file() == (name in SEVERAL_STEPS)
    assert adapter.schedule == published.stages["finetune"].schedule
    assert all(math.isfinite(value) for value in numbers["finetune"].values())
    assert (tmp_path / "export" / "release" / "transformer" / "config.json").is_file()


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("synthetic-")])
def test_the_base_draws_its_own_training_pictures(name, releases, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue square\n")
    fields = load_recipe(name).stages["synthesize"].model_dump(mode="json")
    fields |= {"base": str(releases[name.partition("-")[2]]["base"]), "prompts": str(prompts)}
    fields |= {"pixels": 64, "multiple": 16, "sampling_steps": 1}
    recipe = parse_recipe({"name": name, "output": str(tmp_path / "run"), "stages": {"synthesize": fields}})
    assert dry_run(recipe) == 0
    assert "2 images in 1 tars" in capsys.readouterr().out
    assert run_recipe(recipe)["synthesize"] == {"pictures": 2, "shards": 1}
    assert (tmp_path / "run" / "synthesize" / "pictures" / "00000.tar").is_file()


def test_the_guide_names_recipes_and_switches_that_exist():
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    commands = [shlex.split(words) for words in re.findall(r"train\.run ([^`#\n]+)", guide)]
    named = [words for words in commands if not words[0].startswith(("-", "yours", "RECIPE"))]
    for name, *rest in named:
        load_recipe(name, [word for word in rest if "=" in word])
    assert len(named) > 8
    switches = re.findall(r"`((?:head|finetune|align|cache)\.\S+=\S+)`", guide)
    for switch in switches:
        load_recipe("flux-512", [switch.replace('""', "").replace("STEPS", "100")])
    assert len(switches) == 8

"""Every recipe of a published result takes a real step on a narrow model of its architecture."""

from __future__ import annotations

import math

import pytest

from dcgen.adapter import load_adapter
from train.config import list_recipes, load_recipe, parse_recipe
from train.run import run_recipe

PUBLISHED = [name for name in list_recipes() if name.startswith(("flux-", "sana-", "dit-"))]


@pytest.fixture(scope="module")
def releases(debug_run, tmp_path_factory):
    """Narrow releases by backbone: a base, one that already works on the new latent, and the new autoencoder."""
    runs = {"flux": debug_run}
    for backbone in ("sana", "dit"):
        runs[backbone] = tmp_path_factory.mktemp(backbone)
        run_recipe(load_recipe(f"debug-{backbone}", [f"output={runs[backbone]}"]))
    parts = {"base": "tiny/release", "moved": "export/release", "autoencoder": "tiny/dc-ae"}
    return {backbone: {part: run / path for part, path in parts.items()} for backbone, run in runs.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_step_of_every_stage(name, releases, debug_run, tmp_path):
    narrow = releases[name.split("-")[0]]
    published = load_recipe(name)
    stages = {}
    for stage, config in published.stages.items():
        fields = config.model_dump(mode="json")
        fields |= {"dtype": "float32", "shard": 0}
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
        stages[stage] = fields
    numbers = run_recipe(parse_recipe({"name": name, "output": str(tmp_path), "stages": stages}))
    adapter = load_adapter(tmp_path / "export" / f"{name}.safetensors")
    assert adapter.lora
    assert adapter.schedule == published.stages["finetune"].schedule
    assert all(math.isfinite(value) for value in numbers["finetune"].values())
    assert (tmp_path / "export" / "release" / "transformer" / "config.json").is_file()

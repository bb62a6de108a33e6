"""docs/own_images.md: its recipes load, plan without refusal, train, and print the figures that it quotes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from dcgen.adapter import load_adapter
from train.config import load_recipe
from train.run import main, run_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "own_images.md").read_text(encoding="utf-8")
RECIPES = {re.search(r"^name: (\S+)$", text, re.M)[1]: text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)}
# Command after `$`, and the output below it.
RUNS = re.findall(r"```\n\$ python -m train\.run (\S+ [^\n]*)\n(.*?)```", PAGE, re.S)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the page's recipes and nothing else."""
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_a_recipe_and_two_plans_for_each_model():
    assert len(RECIPES) == PAGE.count("```yaml") == 2
    assert sorted(command.split(".")[0] for command, _ in RUNS) == sorted([*RECIPES, *RECIPES])


@pytest.mark.parametrize(("command", "quoted"), RUNS)
def test_a_dry_run_prints_what_the_page_quotes(own, command, quoted, capsys):
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert not [line for line in lines if "refused" in line]
    assert "".join(line for line in lines if "needed before it runs" not in line) == quoted
    assert "GPU-hours" in quoted


@pytest.mark.parametrize("command", re.findall(r"^(?:python|torchrun .*) -m train\.run (.*)$", PAGE, re.M))
def test_the_commands_without_dry_run_are_valid_too(own, command):
    name, *overrides = command.split()
    load_recipe(name, [item for item in overrides if item != "--dry-run"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_files_named_for_comfyui_are_those_that_a_run_writes(name, own, debug_run, debug_sana):
    """The recipe itself on a narrow base and a small folder: two steps of each stage, with previews."""
    narrow = {"my-flux": debug_run, "my-sana": debug_sana}[name]
    folder = own / "data" / "my_images"
    folder.mkdir(parents=True)
    for number, size in enumerate([(80, 80), (70, 90), (90, 70), (64, 64)] * 2):
        Image.new("RGB", size, (20 * number, 90, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    small = ["cache.data.pixels=64", "cache.data.multiple=16", "cache.batch=4", "cache.text_tokens=8"]
    steps = [f"{stage}.{field}" for stage in ("head", "finetune") for field in ("steps=2", "batch=4", "accumulate=2")]
    small += [*steps, "preview_every=1", "preview_steps=1", "finetune.rank=2", "finetune.alpha=2"]
    places = [f"base={narrow / 'tiny' / 'release'}", f"autoencoder={narrow / 'tiny' / 'dc-ae'}"]
    recipe = load_recipe(f"{name}.yaml", [*small, *places])
    run_recipe(recipe)
    export = own / "runs" / name / "export"
    assert load_adapter(export / f"{name}.safetensors").lora
    assert (export / f"{name}-merged.safetensors").is_file()
    assert (export / "release" / "model_index.json").is_file()
    for stage in ("head", "finetune"):
        assert list((own / "runs" / name / stage / "previews").glob("*.png"))

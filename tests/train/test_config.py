"""Recipes: all of them parse, and every mistake is named with what would be right."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from train.config import RecipeError, list_recipes, load_recipe, parse_recipe
from train.run import fingerprint, inputs, main, run_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_parses_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.rnak=8", r"stages\.finetune: unknown field 'rnak' \(value 8\); did you mean 'rank'\?"),
        ("finetune.rank=none", r"field 'rank' = 'none'"),
        ("finetune.optimizer.lrr=1", r"unknown field 'optimizer\.lrr' .*did you mean 'lr'"),
        ("finetune.objective.timesteps.shft=1", r"did you mean 'shift'"),
        ("fintune.rank=8", r"'fintune' is neither a recipe field nor a stage; did you mean 'finetune'"),
        ("stages.heads.steps=8", r"no stage 'heads'; did you mean 'head'"),
        ("seed=-1", r"field 'seed' = -1"),
        ("align.kind=algn", r"unknown kind 'algn'; did you mean 'align'"),
        ("defaults.autoencodr=x", r"defaults\.autoencodr is a field of no stage here; did you mean 'autoencoder'"),
        ("steps", r"'steps' is not key=value"),
        ("finetune.steps=[1", r"override 'finetune.steps=\[1': not YAML"),
    ],
)
def test_mistakes_name_the_field_the_value_and_the_nearest_name(override, words):
    with pytest.raises(RecipeError) as error:
        load_recipe("debug", [override])
    assert re.search(words, str(error.value)), error.value


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'debug'"):
        load_recipe("debgu")


def test_overrides_are_yaml_and_reach_deep():
    recipe = load_recipe("debug", ["finetune.objective.w=[1, 2]", "finetune.optimizer.clip=0.5", "seed=3"])
    assert recipe.stages["finetune"].objective.w == (1.0, 2.0)
    assert recipe.stages["finetune"].optimizer.clip == 0.5
    assert recipe.seed == 3


def test_an_override_changes_one_place_although_yaml_aliases_share():
    recipe = load_recipe("toy-flux", ["finetune.objective.loss=flow"])
    assert (recipe.stages["head"].objective.loss, recipe.stages["finetune"].objective.loss) == ("guided", "flow")


def test_defaults_reach_every_stage_that_has_the_field_and_yield_to_its_own():
    stages = {"head": {"cache": "x", "base": "b"}, "finetune": {"cache": "x", "batch": 7}, "export": {}}
    recipe = parse_recipe({"name": "n", "defaults": {"base": "a", "batch": 5}, "stages": stages})
    assert (recipe.stages["head"].base, recipe.stages["finetune"].base) == ("b", "a")
    assert (recipe.stages["head"].batch, recipe.stages["finetune"].batch) == (5, 7)


def test_a_stage_depends_on_its_own_settings_and_its_inputs():
    plain, other = load_recipe("debug"), load_recipe("debug", ["cache.store=float16"])
    assert inputs(plain, "finetune") == ["tiny", "cache", "head"]
    assert fingerprint(plain, "tiny") == fingerprint(other, "tiny")
    assert fingerprint(plain, "finetune") != fingerprint(other, "finetune")
    watched = load_recipe("debug", ["finetune.log_every=99"])
    assert fingerprint(plain, "finetune") == fingerprint(watched, "finetune")


def test_a_finished_stage_is_skipped_and_a_changed_one_refused(debug_run, capsys):
    run_recipe(load_recipe("debug", [f"output={debug_run}"]))
    assert capsys.readouterr().out.count("done before") == 7
    with pytest.raises(RecipeError, match=r"finished with other settings \(ridge: 0\.0 -> 0\.1\)"):
        run_recipe(load_recipe("debug", [f"output={debug_run}", "align.ridge=0.1"]))
    with pytest.raises(RecipeError, match=r"one of its inputs .* was made anew"):
        run_recipe(load_recipe("debug", [f"output={debug_run}", "head.batch=2"]), only="finetune")


def test_an_unknown_stage_is_refused(debug_run):
    with pytest.raises(RecipeError, match="has no stage 'fine'"):
        run_recipe(load_recipe("debug", [f"output={debug_run}"]), only="fine")


def test_a_stage_whose_input_is_missing_says_which(tmp_path, capsys):
    assert main(["debug", "--stage", "align", f"output={tmp_path}"]) == 1
    assert "stage cache comes first and is not done" in capsys.readouterr().err


def test_dry_run_and_list_load_no_network(tmp_path):
    code = (
        "import sys; from train.run import main; "
        f"assert main(['debug', '--dry-run', 'output={tmp_path}']) == 0; assert main(['--list']) == 0; "
        "assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules), 'a dry run must not import models'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "debug" in done.stdout
    assert not list(tmp_path.iterdir())


def test_train_imports_without_comfyui():
    code = (
        "import sys, pkgutil, importlib, train\n"
        "sys.modules['comfy'] = None; sys.modules['comfy_api'] = None\n"
        "for m in pkgutil.walk_packages(train.__path__, 'train.'):\n"
        "    importlib.import_module(m.name)\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('comfy', 'comfy_api', 'nodes') and sys.modules[n]]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

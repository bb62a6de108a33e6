"""Recipes: all of them parse, and every mistake is named with what would be right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from dcgen.adapter import load_adapter
from dcgen.schedule import Schedule
from train.config import RecipeError, list_recipes, load_recipe, parse_recipe
from train.data import FolderData, ParquetData
from train.distributed import Ranks
from train.files import MARKER, mark, remove_marked
from train.run import config_hash, inputs, main, make_stage, run_recipe


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
        (
            "fintune.rank=8",
            r"'fintune' is neither a recipe field nor a stage nor a field of stages; did you mean 'finetune'",
        ),
        ("bse=x", r"'bse' is neither .* did you mean 'base'"),
        ("sed=1", r"'sed' is neither .* did you mean 'seed'"),
        ("kind=align", r"'kind' is neither"),
        ("cache.data.pixls=1", r"unknown field 'data\.pixls' .*did you mean 'pixels'.*multiple"),
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


FOLDER = ["cache.data.type=folder", "cache.data.path=mine"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_type_switched_by_override_drops_what_only_the_old_one_has(order):
    data = load_recipe("toy-flux", [*FOLDER, "cache.data.pixels=64"][::order]).stages["cache"].data
    assert (type(data), data.path, data.pixels) == (FolderData, "mine", 64)
    parquet = load_recipe("flux-512", ["cache.data.type=parquet", "cache.data.caption_column=c"]).stages["cache"].data
    assert (type(parquet), parquet.caption_column, parquet.planned) == (ParquetData, "c", 1_000_000)


@pytest.mark.parametrize("type_", ["folder", "toy"])
def test_an_own_override_that_does_not_fit_the_type_is_an_error(type_):
    wrong = {"folder": "split=train", "toy": "pixels=64"}[type_]
    with pytest.raises(RecipeError, match=rf"unknown field 'data\.{wrong.partition('=')[0]}'"):
        load_recipe("toy-flux", [f"cache.data.type={type_}", f"cache.data.{wrong}"])


def test_an_unknown_type_is_refused_by_name_and_keeps_the_rest():
    with pytest.raises(RecipeError, match=r"field 'data' = .*split.*expected tags: 'toy'"):
        load_recipe("toy-flux", ["cache.data.type=fodler"])
    with pytest.raises(RecipeError, match="data"):
        load_recipe("toy-flux", ["cache.data.type=[1]"])


def test_a_type_inside_defaults_is_switched_too(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ndefaults: {data: {type: toy, split: all}, base: b, autoencoder: a}\nstages: {cache: {}}\n"
    )
    override = ["defaults.data.type=folder", "data.path=x"]
    assert load_recipe(tmp_path / "mine.yaml", override).stages["cache"].data == FolderData(type="folder", path="x")


def test_a_field_of_stages_is_an_override_of_its_default():
    recipe = load_recipe("toy-flux", ["base=/x", "preview_steps=7", "batch=3"])
    assert {recipe.stages[name].base for name in recipe.stages} == {"/x"}
    assert recipe.stages["finetune"].preview_steps == 7
    assert recipe.defaults["batch"] == 3


def test_a_stage_keeps_its_own_value_of_an_overridden_default_and_that_is_said(capsys):
    notes = []
    recipe = load_recipe("toy-dit", ["base=/x", "steps=3", "head.base=/y"], note=notes.append)
    assert (recipe.stages["align"].base, recipe.stages["head"].base) == ("pretrain/release", "/y")
    assert "base: stage align keeps its own value 'pretrain/release' (override align.base to change it)" in notes
    assert not any("stage head keeps its own value '/y'" in line for line in notes)
    assert recipe.stages["cache"].steps == 0  # it trains nothing
    assert recipe.stages["align"].steps == 3
    assert main(["debug", "--dry-run", "optimizer.lr=1.0e-4"]) == 0
    assert "optimizer: stage finetune keeps its own value {'lr': 0.001" in capsys.readouterr().out


def test_an_override_that_no_stage_takes_is_refused(capsys):
    assert main(["toy-flux", "--dry-run", "rank=3"]) == 1
    said = capsys.readouterr().err
    assert "rank= has no effect" in said
    assert "stage finetune keeps its own value 48 (override finetune.rank to change it)" in said
    assert load_recipe("toy-flux", ["rank=3", "finetune.rank=4"]).stages["finetune"].rank == 4


def test_a_dry_run_plans_the_stage_that_is_named_and_refuses_another(capsys):
    assert main(["toy-flux", "--dry-run", "--stage", "head"]) == 0
    out = capsys.readouterr().out
    assert "\nhead (" in out
    assert "finetune (" not in out
    assert main(["toy-flux", "--dry-run", "--stage", "finetun"]) == 1
    assert "no stage 'finetun'; did you mean 'finetune'?" in capsys.readouterr().err


def test_defaults_reach_every_stage_that_has_the_field_and_yield_to_its_own():
    stages = {"head": {"cache": "x", "base": "b"}, "finetune": {"cache": "x", "batch": 7}, "export": {}}
    recipe = parse_recipe({"name": "n", "defaults": {"base": "a", "batch": 5}, "stages": stages})
    assert (recipe.stages["head"].base, recipe.stages["finetune"].base) == ("b", "a")
    assert (recipe.stages["head"].batch, recipe.stages["finetune"].batch) == (5, 7)


def test_a_stage_depends_on_its_own_settings_and_its_inputs():
    plain, other = load_recipe("debug"), load_recipe("debug", ["cache.store=float16"])
    assert inputs(plain, "finetune") == ["tiny", "cache", "head"]
    assert config_hash(plain, "tiny") == config_hash(other, "tiny")
    assert config_hash(plain, "finetune") != config_hash(other, "finetune")
    watched = load_recipe("debug", ["finetune.log_every=99"])
    assert config_hash(plain, "finetune") == config_hash(watched, "finetune")


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


# ---- recipes of strangers ------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
STRANGE = {
    "aliases that unfold": ("name: l\nstages: {tiny: {}}\n" + BOMB, "more than"),
    "an alias to itself": ("name: l\nstages: &s {tiny: *s}\n", "more than"),
    "depth": ("name: l\nstages: " + "[" * 5000, "levels"),
    "a little depth": ("name: l\nstages: {tiny: " + "[" * 40 + "]" * 40 + "}", "levels"),
    "no text": (b"\xff\xfe\x00", "UTF-8"),
    "a number for a stage": ("name: l\nstages: {tiny: 5}", r"stages\.tiny is a mapping"),
    "a list for a stage": ("name: l\nstages: {tiny: [a]}", r"stages\.tiny is a mapping"),
    "a list for a kind": ("name: l\nstages: {tiny: {kind: [1]}}", r"stages\.tiny\.kind"),
    "no kind": ("name: l\nstages: {tiny: {kind: null}}", r"stages\.tiny\.kind"),
    "a list of stages": ("name: l\nstages: [a]", "stages"),
    "a date for a name": ("name: 2020-01-01\nstages: {tiny: {}}", "name"),
    "a number for a name of a stage": ("name: l\nstages: {5: {kind: tiny}}", "stages"),
    "size": ("name: l\nabout: " + "x" * (1 << 20) + "\nstages: {tiny: {}}", "more than a recipe has"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_recipes_are_refused_by_file(tmp_path, what):
    text, words = STRANGE[what]
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=rf"mine\.yaml.*{words}"):
        load_recipe(path)


def test_a_recipe_of_windows_is_read(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfname: mine\r\nstages: {tiny: {}}\r\n")
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


OUTSIDE = ["../x", "/x", "..", ".", "", ".hidden", "a/b", "a\\b", "a\nb", "-x", " a", "x" * 200]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_are_one_part_of_a_path(name):
    for raw in (
        {"name": name, "stages": {"tiny": {}}},
        {"name": "mine", "stages": {name: {"kind": "tiny"}}},
    ):
        with pytest.raises(RecipeError, match=r"name begins with|at most|characters"):
            parse_recipe(raw)
    if name:
        with pytest.raises(RecipeError, match="name"):
            load_recipe("debug", [f"export.name={name!r}"])


def test_a_name_may_have_dots_dashes_and_underscores():
    assert list(parse_recipe({"name": "a.b-c_1", "stages": {"1.x-y": {"kind": "tiny"}}}).stages) == ["1.x-y"]


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe("debug", ["output=~/runs/x", "cache.autoencoder=~/dc-ae"])
    assert recipe.folder == tmp_path / "runs" / "x"
    assert make_stage(recipe, "cache", Ranks(0, 1, torch.device("cpu"))).student == tmp_path / "dc-ae"


@pytest.mark.parametrize(
    "override",
    [
        "cache.data.pixels=1000000",
        "cache.data.ratios=[0]",
        "cache.data.ratios=[.nan]",
        "cache.data.ratios=[]",
        "cache.text_tokens=100000000",
        "align.patch_size=1000000",
        "align.batch=1000000000",
        "head.batch=1000000000",
        "gap.samples=9999999999999999",
        "finetune.rank=1000000000",
        "finetune.optimizer.lr=.inf",
        "finetune.preview_guidance=.nan",
        "finetune.preview_steps=1000000000",
        "finetune.schedule={rule: x}",
        "finetune.schedule={rule: static}",
        "finetune.schedule={rul: flx}",
        "finetune.schedule=flux",
        "finetune.objective.timesteps={rule: flx}",
        "finetune.objective.timesteps={rule: static}",
        "tiny.backbone=flx",
        "head.schedule={rule: flux, mu: .nan}",
        "seed=99999999999999999999999",
    ],
)
def test_numbers_that_cannot_work_are_refused_by_field(override):
    tiny = ["cache.data={type: folder, path: x, pixels: 64}"] if "cache.data" in override else []
    if tiny:
        load_recipe("debug", tiny)
    field = override.partition("=")[0].rpartition(".")[2]
    with pytest.raises(RecipeError, match=field):
        load_recipe("debug", [*tiny, override])


# ---- what a run removes --------------------------------------------------------------------------------------------


def test_redo_removes_only_what_a_stage_made(tmp_path):
    raw = {"name": "mine", "output": str(tmp_path / "run"), "stages": {"tiny": {"kind": "tiny"}}}
    precious = tmp_path / "run" / "tiny" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    with pytest.raises(ValueError, match=r"run/tiny was not made by a stage"):
        run_recipe(parse_recipe(raw), redo=True)
    assert precious.read_text() == "x"
    shutil.rmtree(precious.parent)
    run_recipe(parse_recipe(raw))
    assert (tmp_path / "run" / "tiny" / MARKER).is_file()
    precious.write_text("x")
    run_recipe(parse_recipe(raw), redo=True)
    assert not precious.exists()


def test_a_link_is_not_followed_when_a_folder_is_removed(tmp_path):
    for name in ("run", "other"):
        mark(tmp_path / name)
    (tmp_path / "run" / "tiny").symlink_to(tmp_path / "other", target_is_directory=True)
    with pytest.raises(ValueError, match="not removed"):
        remove_marked(tmp_path / "run" / "tiny", tmp_path / "run")
    with pytest.raises(ValueError, match="not removed"):
        remove_marked(tmp_path / "other", tmp_path / "run")
    assert (tmp_path / "other" / MARKER).is_file()
    remove_marked(tmp_path / "run" / "absent", tmp_path / "run")


# ---- late settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["finetune.autoencoder=/nonexistent"],
        ["finetune.autoencoder=/nonexistent", "finetune.train=full", "finetune.preview_every=0"],
    ],
)
def test_what_the_end_needs_is_checked_before_the_first_step(debug_run, tmp_path, overrides):
    shutil.copytree(debug_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "finetune")
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", "finetune.steps=4", *overrides])
    with pytest.raises(RecipeError, match=r"stage finetune cannot run.*\n.*/nonexistent"):
        run_recipe(recipe, only="finetune")
    assert not (tmp_path / "run" / "finetune").exists()


@pytest.mark.parametrize("part", ["model_index.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("stage", ["finetune", "export"])
def test_what_a_release_is_made_of_is_checked_before(debug_run, tmp_path, part, stage):
    shutil.copytree(debug_run, tmp_path / "run")
    forms = ["finetune.train=full", "export.forms=[release]"]
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", *forms])
    assert not make_stage(recipe, stage, Ranks(0, 1, torch.device("cpu"))).check()
    (tmp_path / "run" / "tiny" / "release" / part).write_text("{")
    assert any(part in problem for problem in make_stage(recipe, stage, Ranks(0, 1, torch.device("cpu"))).check())


def test_a_damaged_record_of_a_stage_is_named(debug_run, tmp_path):
    shutil.copytree(debug_run, tmp_path / "run")
    for text in ("{", "[]", "{}"):
        (tmp_path / "run" / "gap" / "done.json").write_text(text)
        with pytest.raises(ValueError, match=r"gap/done\.json"):
            run_recipe(load_recipe("debug", [f"output={tmp_path / 'run'}"]), only="gap")


def test_previews_need_the_text_side_of_the_base(debug_run, tmp_path):
    shutil.copytree(debug_run, tmp_path / "run")
    index = tmp_path / "run" / "tiny" / "release" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "tokenizer": ["transformers", "AutoTokenizer"]}))
    stage = make_stage(
        load_recipe("debug", [f"output={tmp_path / 'run'}"]), "finetune", Ranks(0, 1, torch.device("cpu"))
    )
    assert stage.config.preview_every
    assert stage.config.preview_prompts
    assert any("AutoTokenizer" in problem for problem in stage.check())


def test_a_patch_size_must_divide_the_cached_latents(debug_run):
    recipe = load_recipe("debug", [f"output={debug_run}", "align.patch_size=3"])
    with pytest.raises(ValueError, match="patch_size 3 does not divide"):
        make_stage(recipe, "align", Ranks(0, 1, torch.device("cpu"))).setup()


def test_a_schedule_changed_after_the_end_is_written_without_training_anew(debug_run, tmp_path):
    shutil.copytree(debug_run, tmp_path / "run")
    output = f"output={tmp_path / 'run'}"
    log = (tmp_path / "run" / "finetune" / "log.csv").read_text()
    before = load_adapter(tmp_path / "run" / "finetune" / "adapter.safetensors")
    run_recipe(load_recipe("debug", [output, "finetune.schedule={rule: static, shift: 2.5}"]), only="finetune")
    after = load_adapter(tmp_path / "run" / "finetune" / "adapter.safetensors")
    assert (before.schedule == after.schedule, after.schedule) == (False, Schedule("static", shift=2.5))
    assert all(torch.equal(after.tensors[key], tensor) for key, tensor in before.tensors.items())
    assert (tmp_path / "run" / "finetune" / "log.csv").read_text() == log
    with pytest.raises(RecipeError, match="finished with other settings"):
        run_recipe(load_recipe("debug", [output, "finetune.rank=3"]), only="finetune")

"""Runs from before settings' digests were called config_hash go on: nothing is made anew, and nothing is mixed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train.cache import Cache
from train.config import RecipeError, load_recipe, parse_recipe
from train.distributed import Ranks
from train.files import sha256
from train.run import config_hash, make_stage, run_recipe
from train.stages.cache import CacheStage


def rewrite(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def rename(record):
    if "config_hash" in record:
        record["fingerprint"] = record.pop("config_hash")


@pytest.fixture
def old(debug_run, tmp_path):
    """A copy of the debug run as the program of before left it: other keys in records, index and shards."""
    run = shutil.copytree(debug_run, tmp_path / "run")
    for path in run.glob("*/done.json"):
        rewrite(path, rename)
        rewrite(path, lambda record: [record.pop(key) for key in ("run", "inputs")])
    for path in run.glob("*/checkpoints/*/state.json"):
        rewrite(path, lambda record: record.pop("inputs"))
    digests = {}
    for shard in (run / "cache" / "shards").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stamp = file.metadata()["config_hash"]
        save_file(load_file(shard), shard, metadata={"fingerprint": stamp})
        digests[f"shards/{shard.name}"] = {"sha256": sha256(shard), "bytes": shard.stat().st_size}
        rewrite(shard.with_suffix(".json"), lambda note, key=f"shards/{shard.name}": note.update(digests[key]))
        rewrite(shard.with_suffix(".json"), rename)

    def before(index):
        rename(index)
        index["format"] = 1
        del index["ragged"]
        for record in index["shards"]:
            rename(record)
            record |= digests[record["file"]]
        for space in index["spaces"].values():
            for field in ("mean", "std", "temporal_factor"):
                del space[field]

    rewrite(run / "cache" / "index.json", before)
    assert "config_hash" not in "".join(path.read_text() for path in run.rglob("*.json"))
    return run


def test_nothing_is_made_anew(old, capsys):
    run_recipe(load_recipe("debug", [f"output={old}"]))
    assert capsys.readouterr().out.count("done before") == 7


def test_what_was_not_recorded_is_a_remark_and_no_error(old, capsys):
    (old / "tiny" / "pictures" / "000.txt").write_text("another caption")
    run_recipe(load_recipe("debug", [f"output={old}"]))
    assert capsys.readouterr().out.count("did not record what it read: not compared") == 7
    run_recipe(load_recipe("debug", [f"output={old}", "finetune.steps=7"]), only="finetune")
    assert "step-00000006: made by a version that did not record" in capsys.readouterr().err


def test_a_changed_setting_is_still_refused(old):
    with pytest.raises(RecipeError, match="finished with other settings"):
        run_recipe(load_recipe("debug", [f"output={old}", "align.ridge=0.1"]), only="align")


def test_the_cache_is_read_as_the_new_one(old, debug_run):
    before, now = Cache(old / "cache"), Cache(debug_run / "cache")
    assert before.config_hash == now.config_hash
    assert torch.equal(before.latents([0, 3], "student"), now.latents([0, 3], "student"))
    for name, value in now.text([0, 2]).items():
        assert torch.equal(before.text([0, 2])[name], value)


def test_whole_shards_of_an_unfinished_cache_are_kept(old, monkeypatch):
    (old / "cache" / "done.json").unlink()
    monkeypatch.setattr(CacheStage, "_encode_images", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(CacheStage, "_encode_captions", lambda *_: pytest.fail("encoded again"))
    run_recipe(load_recipe("debug", [f"output={old}"]), only="cache")
    index = json.loads((old / "cache" / "index.json").read_text())
    assert index["format"] == 2
    assert Cache(old / "cache").latents([0], "teacher").isfinite().all()


def test_images_that_were_drawn_before_are_gone_on_with(debug_run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n")
    fields = {"base": str(debug_run / "tiny" / "release"), "prompts": str(prompts), "sampling_steps": 1}
    fields |= {"pixels": 64, "multiple": 16}

    def stage_with(**changes):
        recipe = parse_recipe({"name": "s", "output": str(tmp_path), "stages": {"synthesize": {**fields, **changes}}})
        return make_stage(recipe, "synthesize", Ranks(0, 1, torch.device("cpu")))

    stage_with().setup()
    folder = tmp_path / "synthesize" / "pictures"
    note = json.loads((folder / "config_hash.json").read_text())
    (folder / "config_hash.json").unlink()
    (folder / "fingerprint.json").write_text(json.dumps({"fingerprint": note["config_hash"]}))
    stage_with().setup()
    assert not (folder / "config_hash.json").exists()
    with pytest.raises(RecipeError, match="other settings"):
        stage_with(guidance=2.0).setup()


def test_fields_that_came_later_are_no_change_at_their_default(debug_run):
    """export.original and labels.backbone are newer than finished runs."""
    recipe = load_recipe("debug", [f"output={debug_run}"])
    settings = recipe.stages["export"].settings()
    assert not {"original", "original_rank"} & set(settings)
    changed = load_recipe("debug", [f"output={debug_run}", "export.original=x"])
    assert changed.stages["export"].settings()["original"] == "x"
    assert config_hash(changed, "export") != config_hash(recipe, "export")
    assert "backbone" not in load_recipe("toy-dit").stages["labels"].settings()
    done = json.loads((debug_run / "export" / "done.json").read_text())
    assert done["config_hash"] == config_hash(recipe, "export")

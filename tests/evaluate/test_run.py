"""An evaluation from images to table: the toy's judge through this door, resuming, two ranks, DDPM, refusals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from train.config import RecipeError
from train.evaluate import draw
from train.evaluate.__main__ import main
from train.evaluate.images import exact, read_folder
from train.evaluate.judge import Judge
from train.evaluate.run import evaluate
from train.evaluate.spec import find_table, list_tables, load_evaluation
from train.evaluate.toy import JudgeMetric
from train.files import read_json
from train.generate import Pipeline


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def toy_table(root, folder, **more):
    """A table of the toy with few prompts and steps."""
    toy = root / "toy"
    dcgen = {"base": f"{toy}/flux-base", "adapter": f"{toy}/adapter/toy-flux-dcgen.safetensors"}
    table = {
        "name": "small",
        "output": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "prompts": {"kind": "toy", "path": f"{toy}/data", "first": 12},
        "batch": 4,
        "exact": True,
        "sampling": {"height": 128, "width": 128, "steps": 2, "guidance": 3.5},
        "models": {"base": {"base": f"{toy}/flux-base"}, "dc-gen": {**dcgen, "autoencoder": f"{toy}/dc-ae-f32"}},
        "metrics": {"judge": {"evaluator": f"{toy}/evaluator", "data": f"{toy}/data"}},
        **more,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def toy_run(root, tmp_path_factory):
    """(table, folder, results) of a finished run of two models on the toy."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    table = toy_table(root, folder, speed={"images": 2, "batch": 2})
    return table, folder, evaluate(load_evaluation(table))


def test_the_judges_numbers_are_those_of_the_judge_to_the_digit(root, toy_run):
    _, folder, results = toy_run
    judge = Judge(root / "toy" / "evaluator", root / "toy" / "data")
    pairs = judge.pictures.pairs()
    pairs = [pairs[k * len(pairs) // 12] for k in range(12)]
    pipeline = Pipeline(root / "toy" / "flux-base")
    images = []
    for start in (0, 4, 8):  # as benchmarks/toy.py draws, in these batches
        seeds = [100_000 + index for index in range(start, start + 4)]
        texts = judge.captions(pairs[start : start + 4])
        images.append(pipeline.images(texts, seeds, 128, 128, steps=2, guidance=3.5))
    expected = judge.score(torch.cat(images), pairs).as_dict()
    cells = results["rows"][0]["cells"]
    assert {name: cells[name]["value"] for name in expected} == expected
    assert expected["both_held_out"] > 0  # some are pairs that were never trained
    kept = torch.stack([exact(image.path) for image in read_folder(folder / "base" / "images")])
    assert torch.equal(kept, torch.cat(images))
    assert cells["frechet"]["low"] is None
    assert cells["subject"]["low"] <= cells["subject"]["value"] <= cells["subject"]["high"]


def test_the_table_has_times_digests_and_both_models(toy_run):
    _, folder, results = toy_run
    base, moved = results["rows"]
    assert moved["cells"]["subject"]["difference"]["count"] == 12
    assert "difference" not in base["cells"]["subject"]
    for row in results["rows"]:
        assert len(row["speed"]["seconds"]) == len(row["speed"]["step_seconds"]) == 2
        assert 0 < row["cells"]["step_seconds"]["value"] < row["cells"]["seconds"]["value"]
        assert row["cells"]["images_per_minute"]["value"] > 0
        assert row["cells"]["peak_gib"]["value"] is None  # of CUDA alone
    assert base["speed"]["tokens"] == 4 * moved["speed"]["tokens"]
    assert set(moved["made_of"]["files"]) == {"base", "adapter", "autoencoder"}
    digest = moved["weights"]["judge"]["evaluator"]["files"]["model.safetensors"]
    assert len(digest) == 64
    words = (folder / "table.md").read_text(encoding="utf-8")
    assert "| base | " in words
    assert "Latency (s) ↓" in words
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert digest in page
    assert page.count("<figure>") == 24
    assert 'src="dc-gen/images/000005-s0.png"' in page
    assert (folder / "dc-gen" / "images" / "000005-s0.png").is_file()
    assert read_json(folder / "results.json") == results


def test_only_what_is_missing_is_drawn_and_measured_again(toy_run, tmp_path, monkeypatch):
    table, finished, results = toy_run
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    images = folder / "base" / "images"
    lost = [images / "000001-s0.png", images / "000004-s0.png"]
    before = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    (images / ".000004-s0.png.77.tmp").write_bytes(b"half")  # of a killed run
    drawn = []
    paint = draw.ImageGenerator.images

    def painted(self, prompts, seeds):
        drawn.append((self.name, seeds))
        return paint(self, prompts, seeds)

    monkeypatch.setattr(draw.ImageGenerator, "images", painted)
    monkeypatch.setattr(JudgeMetric, "measure", lambda *given: pytest.fail("measured again"))
    again = evaluate(load_evaluation(table, [f"output={folder}"]))
    assert drawn == [("base", [100_001, 100_004])]
    for path, data in zip(lost, before, strict=True):
        difference = np.asarray(Image.open(path), int) - np.asarray(Image.open(_write(path, data)), int)
        assert abs(difference).max() <= 1  # drawn in another batch
    assert not list(images.glob(".*.tmp"))
    assert again["rows"][0]["cells"]["frechet"] == results["rows"][0]["cells"]["frechet"]


def _write(path, data):
    other = path.with_suffix(".before.png")
    other.write_bytes(data)
    return other


def test_images_of_other_settings_are_not_mixed(toy_run):
    table, _, _ = toy_run
    with pytest.raises(RecipeError, match=r"images of another sampling; remove the folder, or name another output="):
        evaluate(load_evaluation(table, ["sampling.steps=3"]))
    with pytest.raises(RecipeError, match="images of another prompts"):
        evaluate(load_evaluation(table, ["prompts.first=5"]))


def test_two_ranks_draw_what_one_draws(root, tmp_path):
    settings = {"batch": 1, "exact": False, "metrics": {}, "seeds": [0, 7]}
    evaluate(load_evaluation(toy_table(root, tmp_path / "one", **settings), ["prompts.first=3"]))
    table = toy_table(root, tmp_path / "two", **settings)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "train.evaluate", table, "prompts.first=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for model in ("base", "dc-gen"):
        one, two = (read_folder(tmp_path / ranks / model / "images") for ranks in ("one", "two"))
        assert len(one) == 6
        assert {i.name: i.path.read_bytes() for i in one} == {i.name: i.path.read_bytes() for i in two}


def test_a_class_conditional_model_is_sampled_by_ddpm(tmp_path):
    from train.config import load_recipe
    from train.evaluate.ddpm_sampler import ddpm_sample
    from train.run import run_recipe

    run_recipe(load_recipe("debug-dit", [f"output={tmp_path / 'tiny'}"]), only="tiny")
    base = tmp_path / "tiny" / "tiny" / "release"
    table = {
        "name": "classes",
        "output": str(tmp_path / "run"),
        "dtype": "float32",
        "device": "cpu",
        "prompts": {"kind": "classes", "classes": 3, "per_class": 2},
        "batch": 6,
        "exact": True,
        "sampling": {"height": 64, "width": 64, "steps": 5, "sampler": "ddpm", "guidance": 1.0},
        "models": {"plain": {"base": str(base)}, "cfg": {"base": str(base), "sampling": {"guidance": 4.0}}},
    }
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    evaluate(load_evaluation(str(tmp_path / "classes.yaml")))
    plain, guided = (read_folder(tmp_path / "run" / name / "images") for name in ("plain", "cfg"))
    assert [image.prompt.text for image in plain] == ["0", "1", "2", "0", "1", "2"]
    assert any(not torch.equal(exact(a.path), exact(b.path)) for a, b in zip(plain, guided, strict=True))

    pipeline = Pipeline(base)
    space = pipeline.autoencoder.space
    latents = ddpm_sample(
        lambda x, step, cond: pipeline.family.raw_output(pipeline.model, x, step, cond),
        range(100_000, 100_006),
        (space.channels, *space.latent_size(64, 64)),
        pipeline.text(["0", "1", "2", "0", "1", "2"]),
        steps=5,
        empty=pipeline.text([""]),
        guidance=4.0,
    )
    images = pipeline.autoencoder.decode(space.denormalize(latents))
    assert torch.equal(torch.stack([exact(image.path) for image in guided]), images)

    overrides = ["dtype=bfloat16", f"output={tmp_path / 'narrow'}"]
    evaluate(load_evaluation(str(tmp_path / "classes.yaml"), overrides))
    narrow = torch.stack([exact(image.path) for image in read_folder(tmp_path / "narrow" / "cfg" / "images")])
    assert 0 < (narrow - images).abs().mean() < 0.1


def test_a_model_in_bfloat16_draws_about_what_it_draws_in_float32(root, toy_run, tmp_path):
    _, folder, _ = toy_run
    settings = {"dtype": "bfloat16", "metrics": {}, "speed": {"images": 1}}
    evaluate(load_evaluation(toy_table(root, tmp_path / "run", **settings)))
    for name in ("base", "dc-gen"):
        pairs = zip(read_folder(folder / name / "images"), read_folder(tmp_path / "run" / name / "images"), strict=True)
        differences = [(exact(one.path) - exact(other.path)).abs().mean().item() for one, other in pairs]
        assert 0 < max(differences) < 0.05


def test_a_folder_of_images_is_a_row(root, toy_run, tmp_path):
    _, folder, results = toy_run
    models = {name: {"images": str(folder / name / "images")} for name in ("base", "dc-gen")}
    found = evaluate(load_evaluation(toy_table(root, tmp_path / "run", models=models)))
    for row, other in zip(found["rows"], results["rows"], strict=True):
        assert row["cells"]["frechet"]["value"] == other["cells"]["frechet"]["value"]
        assert row["sampling"] is None
    assert not (tmp_path / "run" / "base" / "images").exists()


def test_markup_in_prompts_and_names_is_shown_as_text(root, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"<script>alert({number})</script>", encoding="utf-8")
    table = toy_table(
        root, tmp_path / "run", about="<b>x</b>", metrics={}, models={"one": {"images": str(folder), "about": "<i>"}}
    )
    evaluate(load_evaluation(table, ["gallery=2"]))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;alert(") == 2
    assert "<script" not in page
    assert "<b>x" not in page
    assert "<i>" not in page


@pytest.mark.parametrize("name", list_tables())
def test_every_table_that_comes_with_the_project_is_valid(name):
    evaluation = load_evaluation(name)
    assert evaluation.name == name
    assert evaluation.about


def test_what_is_missing_is_said_at_once_and_nothing_is_drawn(tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["table2", f"output={output}"]) == 1
    said = capsys.readouterr().err
    fields = ("models.flux.base", "models.dc-gen.base", "prompts.path", "metrics.clip.model", "metrics.fid.reference")
    for missing in fields:
        assert missing in said
    assert not output.exists()
    assert main(["table2", "--dry-run", f"output={output}", "--metric", "clip"]) == 1
    said = capsys.readouterr().out
    assert "metrics.clip.model" in said
    assert "metrics.fid" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tabel2"], "no table 'tabel2'.*did you mean 'table2"),
        (["toy", "--metric", "clip"], "no settings for metric clip"),
        (["toy", "--metric", "judgge"], "did you mean 'judge'"),
        (["toy", "model.x=1"], "'model' is no field.*did you mean 'models'"),
        (["toy", "sampling.step=1"], "unknown field 'sampling.step'.*did you mean 'steps'"),
        (["toy", "models.base.sampling.step=1"], "models.base.sampling: unknown field 'step'"),
        (["toy", "models.base.images=x"], "either `base`"),
        (["toy", "seeds=[1, 1]"], "different whole numbers"),
    ],
)
def test_mistakes_are_named_with_what_is_valid(arguments, said, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert re.search(said, error, re.DOTALL), error


def test_the_list_names_the_tables(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{number}" in listed for number in ("table1", "table2", "table3", "table4", "table6", "toy"))
    assert find_table("toy").name == "toy.yaml"


def test_what_does_not_fit_is_said_before_anything_is_drawn(root, tmp_path, capsys):
    table = toy_table(root, tmp_path / "run")
    toy = root / "toy"
    wrong = {
        f"models.dc-gen.adapter={toy}/adapter/toy-sana-dcgen.safetensors": "models.dc-gen: .*adapter",
        f"models.dc-gen.autoencoder={toy}/flux-base/vae": "models.dc-gen: .*does not belong to this adapter",
        "sampling.width=100": "models.base: .*needs multiples of 8.*models.dc-gen: .*needs multiples of 32",
        "sampling.sampler=ddpm": "models.base: sampler ddpm is for models trained by DDPM",
        f"prompts.path={tmp_path}": "prompts: .*captions.json",
        f"models.base={{images: {tmp_path / 'nothing'}}}": "models.base.images .*nothing is no folder",
    }
    for override, said in wrong.items():
        assert main([table, override]) == 1
        error = capsys.readouterr().err
        assert re.search(said, error, re.DOTALL), error
        assert not (tmp_path / "run").exists()

"""The gap of Fig. 4a and the page that a person reads after a run."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
import shutil
import weakref
from html.parser import HTMLParser

import pytest
import torch

from train.config import load_recipe
from train.distributed import Ranks
from train.families import FAMILIES
from train.report import main, write_report
from train.run import main as train_main
from train.run import make_stage, run_recipe
from train.stages import gap
from train.stages.gap import relative_gap

CPU = Ranks(0, 1, torch.device("cpu"))


def test_relative_gap_is_the_squared_distance_after_pooling():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(2, 4, 6, 5, generator=g)
    pooled = base.reshape(2, 2, 2, 3, 2, 5).mean((2, 4))
    new = pooled + torch.randn(2, 2, 3, 5, generator=g)
    expected = ((new - pooled) ** 2).sum() / (pooled**2).sum()
    assert relative_gap(base, pooled) == pytest.approx(0, abs=1e-12)
    assert relative_gap(base, new) == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_has_no_gap_to_itself(debug_run):
    """The base with its own ends, seen through the stage's own hooks."""
    stage = make_stage(load_recipe("debug", [f"output={debug_run}"]), "gap", CPU)
    stage.finish({})
    from train.models import load_network

    model = load_network(stage.base, torch.float32, "cpu").eval()
    text = stage._text([0, 1])
    first = stage._representations(model, [0, 1], "teacher", 2, text)
    assert [tuple(t.shape) for t in first] == [(2, 4, 4, 32), (2, 4, 4, 32)]
    again = stage._representations(model, [0, 1], "teacher", 2, text)
    assert [relative_gap(a, b) for a, b in zip(first, again, strict=True)] == [0.0, 0.0]
    assert relative_gap(*first) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gap_with_text_embedded_on_the_way_holds_one_model_at_a_time(debug_run, dtype, tmp_path, monkeypatch):
    tiny, alive = debug_run / "tiny", []

    def counted(make):
        def made(*arguments, **names):
            assert not [model for model in alive if model() is not None]
            result = make(*arguments, **names)
            alive.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
            return result

        return made

    for place in (gap, FAMILIES["flux"]):
        for name in ("load_network", "moved_network", "text_encoder"):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, counted(getattr(place, name)))
    places = [f"output={tmp_path}", f"base={tiny}/release", f"autoencoder={tiny}/dc-ae"]
    places += [f"cache.data.path={tiny}/pictures", "cache.text=online", f"gap.dtype={dtype}"]
    places += [f"gap.models={{aligned embedder: {debug_run}/align, head: {debug_run}/head}}"]
    recipe = load_recipe("debug", places)
    recipe.stages.pop("tiny")
    run_recipe(recipe, only="cache")
    numbers = run_recipe(recipe, only="gap")["gap"]
    assert len(alive) == 4
    stored = json.loads((debug_run / "gap" / "done.json").read_text())["numbers"]
    exactly = 1e-4 if dtype == "float32" else 0.05
    for name, value in numbers.items():
        assert value == pytest.approx(stored[name], rel=exactly)


def test_alignment_narrows_the_gap_in_every_block(debug_run):
    with open(debug_run / "gap" / "gap.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["aligned embedder"]) < float(row["random embedder"])
    numbers = json.loads((debug_run / "gap" / "done.json").read_text())["numbers"]
    mean = sum(float(row["head"]) for row in rows) / 2
    assert numbers["mean gap, head"] == pytest.approx(mean)


def test_the_report_holds_every_stage_its_numbers_and_pictures(debug_run, capsys):
    page = write_report(debug_run).read_text()
    recipe = json.loads((debug_run / "recipe.json").read_text())
    for name in recipe["stages"]:
        assert f"<h2>{name}</h2>" in page
    assert len(re.findall("data:image/png;base64", page)) == 6  # curves of head, finetune; base, 2 previews; gap
    least = json.loads((debug_run / "align" / "report.json").read_text())["least_loss"]
    assert f"{least:.5g}" in page
    assert not re.search(r"src=\"(?!data:)", page)  # nothing from outside
    assert main(["nowhere"]) == 1
    assert "recipe.json not found" in capsys.readouterr().err


def test_the_report_links_what_a_run_is_for_and_says_what_made_it(debug_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(debug_run, run)
    assert train_main(["debug", f"output={run}", "finetune.log_every=3", "--stage", "export"]) == 0
    page = (run / "report.html").read_text()
    assert f"<pre>python -m train.run debug output={run} finetune.log_every=3 --stage export</pre>" in page
    assert f"torch {importlib.metadata.version('torch')}" in page
    links = re.findall(r'<a href="([^"]*)">', page)
    assert links == [
        "head/adapter.safetensors",
        "finetune/adapter.safetensors",
        "export/debug-merged.safetensors",
        "export/debug.safetensors",
        "export/release/",
    ]
    assert all((run / link).exists() for link in links)
    merged = page[page.index("debug-merged.safetensors</a>") :].partition("<tr>")[0]
    assert "models/diffusion_models" in merged
    assert "Load Model (DC-Gen)" in merged


def test_previews_of_every_stage_stand_together_newest_last(debug_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(debug_run, run)
    image = next((run / "finetune" / "previews").glob("*.png")).read_bytes()
    base = (run / "finetune" / "previews" / "base.png").read_bytes()
    shutil.rmtree(run / "finetune" / "previews")
    for stage, steps in (("head", (2, 10)), ("finetune", range(100, 1300, 100))):
        (run / stage / "previews").mkdir(parents=True)
        for step in steps:
            (run / stage / "previews" / f"samples-{step:08d}.png").write_bytes(image)
    (run / "finetune" / "previews" / "base.png").write_bytes(base)
    (run / "grid.png").write_bytes(image)
    write_report(run)
    samples = (run / "report.html").read_text().partition("<h2>Samples</h2>")[2].partition("<h2>")[0]
    shown = re.findall(r'alt="([^"]*)"', samples)
    assert shown[0] == "grid"
    assert [int(re.search(r"\d+", name)[0]) for name in shown[1:3]] == [2, 10]
    assert shown[3] == "finetune, base"
    assert "the base itself on its own latent" in samples
    steps = [int(re.search(r"\d+", name)[0]) for name in shown[4:]]
    assert len(steps) == 8
    assert steps == sorted(steps)
    assert steps[-1] == 1200
    assert "a red square on the left | a blue square on the right" in samples


MARK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """Names of tags and attributes on a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.events = set(), set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.events |= {key for key, _ in attrs if key.startswith("on")}


def test_nothing_in_a_run_folder_is_markup(tmp_path):
    (tmp_path / "cache" / "previews").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    stages = {"cache": {"kind": "cache", "steps": MARK, MARK: MARK, "preview_prompts": [MARK]}}
    stages["out"] = {"kind": "export", "steps": 0}
    for name in ("javascript:alert(1) <b onload=x>.safetensors", "\"onclick=x'.safetensors"):
        (tmp_path / "out" / name).write_bytes(b"")
    record = {"command": ["python", MARK, "a b"], "versions": {MARK: MARK}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    recipe = {"name": MARK, "about": MARK, "seed": MARK, "stages": stages}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    numbers = {MARK: MARK, "a": [MARK], "b": {MARK: 1}}
    (tmp_path / "cache" / "done.json").write_text(json.dumps({"seconds": 1.0, "numbers": numbers}))
    (tmp_path / "cache" / "log.csv").write_text(f'step,loss,grad_norm,images_per_s,"{MARK[:6]}"\n1,1,1,1,1\n')
    (tmp_path / "cache" / "previews" / "<b onload=x>.png").write_bytes(b"")
    page = write_report(tmp_path).read_text()
    found = Tags(page)
    assert not found.tags & {"script", "b"}
    assert not found.events
    assert page.count("&lt;script&gt;alert(1)") >= 12
    for link in re.findall(r'href="([^"]*)"', page):
        assert re.fullmatch(r"out/[A-Za-z0-9%._()-]+", link)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": {"../victim": {"kind": "tiny", "steps": 1}}}, r"\.\./victim"),
        ({"stages": [1]}, "stages"),
        ({"stages": {"a": 5}}, "a is 5"),
        ({"stages": {"a": {"kind": [1], "steps": 1}}}, "unknown kind"),
        ({"stages": {"a": {"steps": 1}}}, "kind is missing"),
    ],
)
def test_a_strange_run_folder_is_refused_by_name(tmp_path, change, words, capsys):
    recipe = {"name": "x", "about": "", "seed": 0, "stages": {}, **change}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert main([str(tmp_path)]) == 1
    assert re.search(rf"recipe\.json.*{words}", capsys.readouterr().err)

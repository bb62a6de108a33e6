"""Loss on what is held out, at fixed noise levels; and the files and trackers that numbers go to."""

from __future__ import annotations

import csv
import json
import math
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from train.batches import Batch
from train.config import RecipeError, load_recipe
from train.distributed import Ranks
from train.log import Log
from train.objective import Timesteps
from train.run import make_stage, run_recipe

CPU = Ranks(0, 1, torch.device("cpu"))
LONG = ["finetune.preview_every=0", "finetune.steps=6", "finetune.checkpoint_every=3", "finetune.ema=0.5"]
HELD = ["finetune.validation_samples=4", "finetune.validation_every=2"]


@pytest.mark.parametrize(
    "fields",
    [{}, {"mean": 0.4, "std": 1.3}, {"distribution": "uniform", "rule": "static", "shift": 3.0}, {"rule": "none"}],
)
def test_levels_are_quantiles_of_what_training_draws(fields):
    timesteps = Timesteps(**fields)
    many = Batch(0, 0, tuple(range(20_000)), (0,) * 20_000, CPU.device)
    drawn = timesteps.draw(many, tokens=1024, channels=32).sort().values
    wanted = drawn[[int((k + 0.5) / 8 * len(drawn)) for k in range(8)]]
    torch.testing.assert_close(timesteps.quantiles(8, 1024, 32), wanted, rtol=0, atol=0.02)


def run(debug_run, out, *overrides):
    """A fine-tuning on the cache and head of a finished debug run."""
    tiny = debug_run / "tiny"
    places = [f"finetune.cache={debug_run}/cache", f"finetune.start={debug_run}/head"]
    places += [f"finetune.base={tiny}/release", f"finetune.autoencoder={tiny}/dc-ae"]
    recipe = load_recipe("debug", [f"output={out}", *places, *LONG, *overrides])
    run_recipe(recipe, only="finetune")
    return recipe


def table(path):
    with open(path, newline="") as handle:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(handle)]


@pytest.fixture(scope="module")
def held(debug_run, tmp_path_factory):
    """A run with four of twelve samples held out."""
    out = tmp_path_factory.mktemp("held")
    return run(debug_run, out, *HELD), out / "finetune"


def test_what_is_held_out_is_not_trained(held):
    stage = make_stage(held[0], "finetune", CPU)
    stage.setup()
    assert stage.held_out() == [0, 3, 6, 9]
    trained = {number for bucket in stage.buckets() for number in bucket}
    assert trained == set(range(12)) - {0, 3, 6, 9}
    stage.config = stage.config.model_copy(update={"validation_samples": 7})
    with pytest.raises(ValueError, match="more than half of the 12 samples"):
        stage.buckets()


@pytest.mark.parametrize("kind", ["", "ema_"])
def test_the_loss_is_that_of_the_held_out_samples_by_hand(held, kind):
    """Eq. 7 at each level, of the weights of the checkpoint or their average."""
    recipe, folder = held
    stage = make_stage(recipe, "finetune", CPU)
    model = stage.setup().eval()
    file = {"": "weights", "ema_": "ema"}[kind]
    weights = load_file(folder / "checkpoints" / "step-00000006" / f"{file}.safetensors")
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])
    row = table(folder / "validation.csv")[-1]
    levels = []
    for level in range(8):
        # the middle of an eighth of logit-normal draws, at the shift of 16 tokens
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((level + 0.5) / 8))
        shift = math.exp(0.5 + (16 - 256) * 0.65 / 3840)
        sigma = shift * torch.sigmoid(z) / (1 + (shift - 1) * torch.sigmoid(z))
        errors = []
        for number in (0, 3, 6, 9):
            batch = Batch(20_250_929, level, (number,), (number,), CPU.device)
            x0, cond = stage.samples(batch)
            noise, w = batch.normal("noise", x0.shape[1:]), 3.0 * batch.uniform("w")
            x = (1 - sigma) * x0 + sigma * noise
            with torch.no_grad():
                v, u = (stage.velocity(x, sigma[None], c, 1 + w) for c in (cond, stage.empty))
            errors.append(((v + w * u) / (1 + w) - (noise - x0)).square().mean())
        levels.append(float(torch.stack(errors).mean()))
        assert row[f"{kind}loss_{level}"] == pytest.approx(levels[-1], rel=1e-4)
    assert row[f"{kind}loss"] == pytest.approx(sum(levels) / 8, rel=1e-4)


def test_measuring_changes_no_weight(debug_run, held, tmp_path):
    seldom = run(debug_run, tmp_path, HELD[0], "finetune.validation_every=500")
    one, other = (load_file(folder / "adapter.safetensors") for folder in (held[1], seldom.folder / "finetune"))
    assert all(torch.equal(one[name], value) for name, value in other.items())
    assert [row["step"] for row in table(held[1] / "validation.csv")] == [2, 4, 6]
    assert [row["step"] for row in table(tmp_path / "finetune" / "validation.csv")] == [6]
    without = run(debug_run, tmp_path / "all")
    assert not (tmp_path / "all" / "finetune" / "validation.csv").exists()
    assert "validation_samples" not in without.stages["finetune"].settings()


@pytest.mark.parametrize("name", ["debug_sana", "debug_dit"])
def test_other_families_measure_too(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    stage = make_stage(
        load_recipe(name.replace("_run", "").replace("_", "-"), [f"output={folder}", *HELD]), "finetune", CPU
    )
    stage.setup()
    numbers = stage.validate()
    assert len(numbers) == 9
    assert all(math.isfinite(value) and value > 0 for value in numbers.values())
    assert stage.validate() == numbers


def test_one_file_has_all_events_and_loses_those_of_steps_that_run_again(tmp_path):
    log = Log(tmp_path, 0, True)
    for step in (1, 2, 3):
        log.row(step, {"loss": 1.0 / step, "loss_uncond": math.nan})
        log.validation(step, {"loss": 2.0})
    log.images(2, {"samples": torch.zeros(3, 4, 4)})
    log.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed
    log = Log(tmp_path, 2, True)
    log.row(3, {"loss": 0.5, "loss_uncond": 0.25})
    log.close()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert all(event.pop("time") > 1e9 for event in events)
    assert events == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "validation/loss": 2.0},
        {"step": 2, "loss": 0.5},
        {"step": 2, "validation/loss": 2.0},
        {"step": 2, "image/samples": "previews/samples-00000002.png"},
        {"step": 3, "loss": 0.5, "loss_uncond": 0.25},
    ]
    assert [row["step"] for row in table(tmp_path / "validation.csv")] == [1, 2]


class Fake(types.ModuleType):
    """The calls of wandb that a tracker makes."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.ended = [], [], 0
        self.__spec__ = types.SimpleNamespace(name="wandb", loader=None)

    def init(self, **settings):
        self.begun.append(settings)
        self.id = settings["id"] or "abc"
        return self

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.ended += 1

    def Image(self, array):
        return array.shape


def test_wandb_gets_numbers_and_images_and_goes_on_in_the_same_run(debug_run, tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    previews = ["finetune.preview_every=3", "finetune.log_every=1"]
    run(debug_run, tmp_path, "wandb=dc-gen", *HELD, *previews)
    run(debug_run, tmp_path, "wandb=dc-gen", *HELD, *previews, "finetune.steps=8")
    assert [(s["project"], s["name"], s["id"]) for s in fake.begun] == [
        ("dc-gen", "debug/finetune", None),
        ("dc-gen", "debug/finetune", "abc"),
    ]
    assert fake.ended == 2
    assert [v["step"] for v in fake.logged if "loss" in v] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [v["step"] for v in fake.logged if "validation/ema_loss" in v] == [2, 4, 6, 8]
    assert [v["step"] for v in fake.logged if "samples" in v] == [3, 6]


def test_wandb_that_is_not_installed_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs the package wandb: pip install -r train/requirements-optional\.txt"):
        run_recipe(load_recipe("debug", [f"output={tmp_path}/run", "wandb=dc-gen"]))
    assert not (tmp_path / "run").exists()

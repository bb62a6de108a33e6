"""The loop against a plain float64 AdamW, and what it does when something goes wrong."""

from __future__ import annotations

import csv
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from train import checkpoint
from train.batches import BatchPlan
from train.config import Optimizer, Recipe, StageConfig
from train.distributed import Ranks
from train.loop import NonFinite, Stopped, train_stage
from train.stages.base import Context, Stage

CPU = Ranks(0, 1, torch.device("cpu"))


class Config(StageConfig):
    kind: str = "line"
    steps: int = 12
    batch: int = 4
    log_every: int = 5
    checkpoint_every: int = 5


class Line(Stage):
    """Linear regression of x -> 2x0 - x1."""

    Config = Config

    def __init__(self, config, context, at=None):
        super().__init__(config, context)
        self.at = at or {}
        self.seen = []

    def setup(self):
        torch.manual_seed(3)
        self.net = nn.Linear(2, 1)
        return self.net

    def buckets(self):
        return [range(10)]

    def loss(self, batch):
        self.seen.append((batch.step, batch.indices))
        x = batch.normal("x", (2,))
        loss = (self.net(x)[:, 0] - (2 * x[:, 0] - x[:, 1])).square().mean()
        if batch.step in self.at:
            loss = self.at[batch.step](loss)
        return loss, {"double": 2 * loss}


def make(tmp_path, at=None, **fields) -> Line:
    config = Config(**fields)
    recipe = Recipe(name="t", output=str(tmp_path), stages={"line": config})
    return Line(config, Context(recipe, "line", tmp_path / "line", CPU.device), at)


def train(stage: Line) -> dict[str, torch.Tensor]:
    return train_stage(stage, stage.setup(), CPU, seed=5)


def by_hand(steps: int, *, lr, betas, decay, warmup, clip, ema, batch):
    """AdamW, clipping and EMA as their papers write them, in float64."""
    torch.manual_seed(3)
    net = nn.Linear(2, 1).double()
    plan = BatchPlan([range(10)], batch, 5)
    p = [x.detach().clone().requires_grad_() for x in net.parameters()]
    m, v, average = ([torch.zeros_like(x) for x in p] for _ in range(3))
    average = [x.detach().clone() for x in p]
    for step in range(steps):
        (b,) = plan.micro_batches(step, rank=0, world=1, accumulate=1, device=CPU.device)
        x = b.normal("x", (2,)).double()
        loss = (x @ p[0].T + p[1] - (2 * x[:, :1] - x[:, 1:])).square().mean()
        g = torch.autograd.grad(loss, p)
        norm = math.sqrt(sum(float(t.square().sum()) for t in g))
        factor = min(1.0, clip / (norm + 1e-6))
        rate = lr * min(1.0, (step + 1) / warmup)
        for k in range(2):
            grad = g[k] * factor
            m[k] = betas[0] * m[k] + (1 - betas[0]) * grad
            v[k] = betas[1] * v[k] + (1 - betas[1]) * grad**2
            mhat, vhat = m[k] / (1 - betas[0] ** (step + 1)), v[k] / (1 - betas[1] ** (step + 1))
            p[k] = (p[k] * (1 - rate * decay) - rate * mhat / (vhat.sqrt() + 1e-8)).detach().requires_grad_()
            average[k] = ema * average[k] + (1 - ema) * p[k].detach()
    return {"weight": average[0], "bias": average[1]}


def test_adamw_clip_warmup_and_ema_as_written(tmp_path):
    optimizer = Optimizer(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, warmup=4, clip=0.7)
    found = train(make(tmp_path, steps=20, optimizer=optimizer, ema=0.9))
    expected = by_hand(20, lr=0.05, betas=(0.8, 0.95), decay=0.1, warmup=4, clip=0.7, ema=0.9, batch=4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    whole = train(make(tmp_path / "a", steps=8))
    parts = train(make(tmp_path / "b", steps=8, accumulate=4))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_bad_batch_stops_before_the_update_and_is_named(tmp_path, fault):
    good = train(make(tmp_path / "good", steps=7))
    stage = make(tmp_path / "bad", at={7: lambda loss: loss * fault}, checkpoint_every=7)
    with pytest.raises(NonFinite, match=r"step 7.*samples") as error:
        train(stage)
    expected = BatchPlan([range(10)], 4, 5).indices(7)
    assert f"samples {', '.join(map(str, expected))}" in str(error.value)
    for name, parameter in stage.net.named_parameters():
        assert torch.equal(parameter.detach(), good[name])
    resumed = train(make(tmp_path / "bad", steps=7))
    assert all(torch.equal(resumed[name], good[name]) for name in good)


def test_sigterm_saves_finishes_the_step_and_resumes_bit_for_bit(tmp_path):
    def stop(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    whole = train(make(tmp_path / "whole", ema=0.9))
    with pytest.raises(Stopped, match="after step 8"):
        train(make(tmp_path / "cut", at={7: stop}, ema=0.9))
    stage = make(tmp_path / "cut", ema=0.9)
    resumed = train(stage)
    assert stage.seen[0][0] == 8
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    written = checkpoint.write_tensors

    def full(path, *arguments):
        if "step-00000010" in str(path) and path.name.startswith("optimizer"):
            raise OSError(28, "No space left on device")
        return written(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="the one before is intact"):
        train(make(tmp_path))
    assert [path.name for path in (tmp_path / "line" / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    whole = train(make(tmp_path / "whole"))
    resumed = train(make(tmp_path))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_other_settings_are_refused(tmp_path):
    train(make(tmp_path))
    with pytest.raises(checkpoint.CheckpointError, match=r"batch: 4 -> 8.*remove the folder .*checkpoints to"):
        train(make(tmp_path, batch=8))


def half(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


DAMAGE = {
    "weights cut short": half,
    "state cut short": lambda folder: (folder / "state.json").write_text('{"format": 1, '),
    "state of another kind": lambda folder: (folder / "state.json").write_text('{"format": 1, "step": "x"}'),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no moments": lambda folder: (folder / "optimizer.safetensors").unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, what):
    result = train(make(tmp_path))
    folder = tmp_path / "line" / "checkpoints"
    DAMAGE[what](folder / "step-00000012")
    again = train(make(tmp_path))
    assert all(torch.equal(again[name], result[name]) for name in result)
    assert "step-00000012 " in capsys.readouterr().err.replace("/weights", " ").replace("/optimizer", " ")
    assert sorted(path.name for path in folder.iterdir()) == [
        "damaged-step-00000012",
        "step-00000010",
        "step-00000012",
    ]


def test_a_stray_folder_is_no_checkpoint(tmp_path):
    result = train(make(tmp_path))
    (tmp_path / "line" / "checkpoints" / "step-00000099").mkdir()
    again = train(make(tmp_path))
    assert all(torch.equal(again[name], result[name]) for name in result)


def test_when_all_are_damaged_the_message_says_what_to_remove(tmp_path):
    train(make(tmp_path))
    folder = tmp_path / "line" / "checkpoints"
    for path in folder.iterdir():
        half(path)
    with pytest.raises(checkpoint.CheckpointError, match=rf"remove the folder {folder} to start anew"):
        train(make(tmp_path))


def test_a_row_after_a_resume_tells_of_the_steps_before(tmp_path, monkeypatch):
    """Stopped at a checkpoint between two rows of the log: the same rows as of a run that was not."""

    def rows(folder):
        with open(folder / "line" / "log.csv", newline="") as handle:
            return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(handle)]

    train(make(tmp_path / "whole", steps=10, checkpoint_every=4))
    saved = checkpoint.save

    def die(folder, step, *arguments):
        saved(folder, step, *arguments)
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", die)
    with pytest.raises(KeyboardInterrupt):
        train(make(tmp_path / "cut", steps=10, checkpoint_every=4))
    monkeypatch.undo()
    train(make(tmp_path / "cut", steps=10, checkpoint_every=4))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_the_log_has_one_row_per_interval_after_a_resume(tmp_path):
    train(make(tmp_path, steps=10, checkpoint_every=4))
    rows = (tmp_path / "line" / "log.csv").read_text().splitlines()
    assert rows[0].split(",")[:3] == ["step", "loss", "double"]
    assert [row.split(",")[0] for row in rows[1:]] == ["5", "10"]
    train(make(tmp_path, steps=15))
    rows = (tmp_path / "line" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["5", "10", "15"]


def test_batches_do_not_depend_on_ranks_or_accumulation():
    plan = BatchPlan([range(7), range(7, 20)], 4, 9)
    for step in range(3 * plan.steps_per_epoch):
        (whole,) = plan.micro_batches(step, rank=0, world=1, accumulate=1, device=CPU.device)
        parts = [
            b
            for rank in range(2)
            for b in plan.micro_batches(step, rank=rank, world=2, accumulate=2, device=CPU.device)
        ]
        assert sum((b.indices for b in parts), ()) == whole.indices
        assert torch.equal(torch.cat([b.normal("n", (3,)) for b in parts]), whole.normal("n", (3,)))
        assert len({index < 7 for index in whole.indices}) == 1  # one bucket
    epoch = [plan.indices(step) for step in range(plan.steps_per_epoch)]
    assert set(sum(epoch, ())) == set(range(20))
    assert epoch != [plan.indices(step + plan.steps_per_epoch) for step in range(plan.steps_per_epoch)]


def test_random_numbers_differ_by_step_slot_and_purpose():
    plan = BatchPlan([range(8)], 8, 1)
    (first,) = plan.micro_batches(0, rank=0, world=1, accumulate=1, device=CPU.device)
    (second,) = plan.micro_batches(1, rank=0, world=1, accumulate=1, device=CPU.device)
    values = torch.cat([first.normal("a", ()), first.normal("b", ()), second.normal("a", ())])
    assert len(values.unique()) == 24


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch=4 is not a multiple"):
        train(make(tmp_path, accumulate=3))


class Shown(Line):
    """Keeps the weights that previews are drawn with."""

    def preview(self, step):
        self.shown = {**getattr(self, "shown", {}), step: self.net.weight.detach().clone()}
        return {}


def test_previews_are_drawn_with_the_average_and_change_nothing(tmp_path):
    weights = {}
    for name, every in (("with", 3), ("without", 0)):
        stage = make(tmp_path / name, steps=9, ema=0.8, preview_every=every, checkpoint_every=3, keep_checkpoints=9)
        stage.__class__ = Shown
        train(stage)
        folder = tmp_path / name / "line" / "checkpoints"
        weights[name] = {
            (step, file): load_file(folder / f"step-{step:08d}" / f"{file}.safetensors")["weight"]
            for step in (3, 6, 9)
            for file in ("weights", "ema")
        }
        if every:
            assert list(stage.shown) == [3, 6, 9]
            for step, shown in stage.shown.items():
                assert torch.equal(shown, weights[name][step, "ema"])
                assert not torch.equal(shown, weights[name][step, "weights"])
    assert all(torch.equal(value, weights["without"][key]) for key, value in weights["with"].items())

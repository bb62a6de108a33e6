"""One process a run folder; what a killed one leaves behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from train.config import load_recipe
from train.lock import LOCK, InUse, locked, sweep
from train.run import main, run_recipe

HOLD = """
import sys, time
from pathlib import Path
from train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_names_its_holder_and_is_not_touched(holder, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(InUse, match=rf"run is in use .*{socket.gethostname()}, process {holder.pid}, since 20\d\d-"):
        run_recipe(load_recipe("debug", [f"output={run}"]))
    assert main(["debug", f"output={run}"]) == 1
    assert "in use by another process" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [LOCK]
    assert main(["debug", f"output={run}", "--dry-run"]) == 0


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()
    with locked(tmp_path / "run"):
        pass


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    left = tmp_path / "stage" / "checkpoints" / ".step-00000004.123.tmp"
    left.mkdir(parents=True)
    (left / "weights.safetensors").touch()
    (tmp_path / "stage" / ".adapter.safetensors.77.tmp").touch()
    kept = [tmp_path / "stage" / name for name in ("a.tmp", ".hidden", ".x.tmp", "notes.12.tmp")]
    outside = tmp_path / "outside" / ".a.1.tmp"
    outside.parent.mkdir()
    for path in (*kept, outside):
        path.touch()
    (tmp_path / "stage" / "link").symlink_to(outside.parent, target_is_directory=True)
    assert len(sweep([tmp_path / "stage", tmp_path / "absent"])) == 2
    assert not left.exists()
    assert all(path.exists() for path in (*kept, outside))


def test_a_run_sweeps_what_a_killed_one_left(tmp_path):
    left = tmp_path / "run" / "tiny" / ".release.1.tmp"
    left.mkdir(parents=True)
    top = [tmp_path / "run" / name for name in (".recipe.json.7.tmp", ".notes.txt.7.tmp")]
    for path in top:
        path.touch()
    run_recipe(load_recipe("debug", [f"output={tmp_path / 'run'}"]), only="tiny")
    assert not left.exists()
    assert [path.exists() for path in top] == [False, True]

"""A run in its own process, killed and resumed, on one rank and on two."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
STEPS = ["finetune.steps=40", "finetune.checkpoint_every=10", "finetune.preview_every=0", "finetune.log_every=5"]


def command(debug_run: Path, out: Path, ranks: int) -> list[str]:
    python = [sys.executable, "-m", "train.run"]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        python = [sys.executable, *launch, "-m", "train.run"]
    inputs = [f"finetune.cache={debug_run}/cache", f"finetune.start={debug_run}/head"]
    inputs += [f"finetune.base={debug_run}/tiny/release", f"output={out}"]
    return [*python, "debug", "--stage", "finetune", *inputs, *STEPS]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(debug_run: Path, out: Path, ranks: int = 1) -> dict:
    done = subprocess.run(
        command(debug_run, out, ranks), cwd=REPO, env=environment(), capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "finetune" / "adapter.safetensors")


def stop_midway(debug_run: Path, out: Path, number: int, ranks: int = 1) -> subprocess.CompletedProcess:
    """Start a run, wait for its second checkpoint, send the signal to every process of it."""
    process = subprocess.Popen(
        command(debug_run, out, ranks), cwd=REPO, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (out / "finetune" / "checkpoints" / "step-00000020").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < until, "no checkpoint within two minutes"
        time.sleep(0.005)
    os.killpg(process.pid, number)
    out_text, error_text = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out_text, error_text)


@pytest.fixture(scope="module")
def whole(debug_run, tmp_path_factory):
    """The adapter of an uninterrupted run on one rank."""
    return run(debug_run, tmp_path_factory.mktemp("whole"))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_kill_9_and_the_same_command_give_the_same_bits(debug_run, whole, tmp_path):
    killed = stop_midway(debug_run, tmp_path, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "finetune" / "done.json").exists()
    assert equal(run(debug_run, tmp_path), whole)


def test_sigterm_says_what_it_did_and_resumes(debug_run, whole, tmp_path):
    stopped = stop_midway(debug_run, tmp_path, signal.SIGTERM)
    assert stopped.returncode == 143
    assert re.search(r"stopped by a signal after step \d+; checkpoint in", stopped.stderr)
    assert equal(run(debug_run, tmp_path), whole)


def test_two_ranks_killed_and_resumed_equal_two_ranks_and_nearly_one(debug_run, whole, tmp_path):
    both = run(debug_run, tmp_path / "both", ranks=2)
    stop_midway(debug_run, tmp_path / "cut", signal.SIGKILL, ranks=2)
    assert equal(run(debug_run, tmp_path / "cut", ranks=2), both)
    assert largest_difference(both, whole) < 1e-4
    stop_midway(debug_run, tmp_path / "fewer", signal.SIGKILL, ranks=2)
    assert largest_difference(run(debug_run, tmp_path / "fewer", ranks=1), whole) < 1e-4


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)

"""A run in its own process, killed and resumed, on one rank and on two."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
STEPS = ["finetune.steps=12", "finetune.checkpoint_every=3", "finetune.preview_every=0", "finetune.rank=2"]


def start(debug_run: Path, out: Path, ranks: int) -> list[subprocess.Popen]:
    """The run's processes, launched as torchrun launches them (without its agent, which costs another import)."""
    inputs = [f"finetune.cache={debug_run}/cache", f"finetune.start={debug_run}/head"]
    inputs += [f"finetune.base={debug_run}/tiny/release", f"finetune.autoencoder={debug_run}/tiny/dc-ae"]
    inputs += [f"output={out}"]
    command = [sys.executable, "-m", "train.run", "debug", "--stage", "finetune", *inputs, *STEPS]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.PIPE, text=True))
    return processes


def run(debug_run: Path, out: Path, ranks: int = 1) -> dict:
    """The adapter of a run that is left to finish."""
    for process in start(debug_run, out, ranks):
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error[-3000:]
    return load_file(out / "finetune" / "adapter.safetensors")


def stop_midway(debug_run: Path, out: Path, number: int, ranks: int = 1) -> tuple[int, str]:
    """Send a signal to all processes of a run after its second checkpoint; (exit code, stderr) of the first."""
    processes = start(debug_run, out, ranks)
    until = time.monotonic() + 200
    while not (out / "finetune" / "checkpoints" / "step-00000006").exists():
        assert processes[0].poll() is None, processes[0].stderr.read()[-3000:]
        assert time.monotonic() < until, "no checkpoint in time"
        time.sleep(0.002)
    for process in processes:
        process.send_signal(number)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    return processes[0].returncode, errors[0]


@pytest.fixture(scope="module")
def whole(debug_run, tmp_path_factory):
    """The adapter of an uninterrupted run on one rank."""
    return run(debug_run, tmp_path_factory.mktemp("whole"))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_kill_9_and_the_same_command_give_the_same_bits(debug_run, whole, tmp_path):
    code, _ = stop_midway(debug_run, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "finetune" / "done.json").exists()
    assert equal(run(debug_run, tmp_path), whole)


def test_sigterm_says_what_it_did(debug_run, tmp_path):
    code, error = stop_midway(debug_run, tmp_path, signal.SIGTERM)
    assert code == 143
    assert re.search(r"stopped by a signal after step \d+; checkpoint in", error)


def test_two_ranks_killed_equal_two_ranks_and_nearly_one(debug_run, whole, tmp_path):
    both = run(debug_run, tmp_path / "both", ranks=2)
    stop_midway(debug_run, tmp_path / "cut", signal.SIGKILL, ranks=2)
    shutil.copytree(tmp_path / "cut", tmp_path / "fewer")
    assert equal(run(debug_run, tmp_path / "cut", ranks=2), both)
    assert largest_difference(both, whole) < 1e-4
    assert largest_difference(run(debug_run, tmp_path / "fewer", ranks=1), whole) < 1e-4


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)

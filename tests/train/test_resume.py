"""A run in its own process, killed, stopped or out of disk, and resumed; on one rank and on two."""

from __future__ import annotations

import csv
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

STEPS = ["finetune.steps=12", "finetune.checkpoint_every=3", "finetune.preview_every=0", "finetune.rank=2"]
STEPS += ["finetune.log_every=1"]


def enter(arguments: list[str], environment: dict[str, str], errors: Path) -> None:
    """One rank, in its own process: `python -m train.run ARGUMENTS` with its messages in a file."""
    import torch

    from train.run import main

    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.exit(main(arguments))


class Run:
    """The processes of one run, launched with the environment that torchrun gives."""

    def __init__(self, processes, debug_run: Path, out: Path, ranks: int = 1) -> None:
        inputs = [f"finetune.cache={debug_run}/cache", f"finetune.start={debug_run}/head"]
        inputs += [f"finetune.base={debug_run}/tiny/release", f"finetune.autoencoder={debug_run}/tiny/dc-ae"]
        arguments = ["debug", "--stage", "finetune", *inputs, f"output={out}", *STEPS]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        out.mkdir(parents=True, exist_ok=True)
        self.checkpoints = out / "finetune" / "checkpoints"
        self.adapter = out / "finetune" / "adapter.safetensors"
        self.errors = [out / f"errors-{rank}.txt" for rank in range(ranks)]
        self.ranks = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **where}
            job = (arguments, place if ranks > 1 else {}, self.errors[rank])
            self.ranks.append(processes.Process(target=enter, args=job))
            self.ranks[-1].start()

    def wait(self) -> tuple[int | None, str]:
        """(exit code, messages) of the first rank when all have ended."""
        for process in self.ranks:
            process.join(timeout=300)
        return self.ranks[0].exitcode, self.errors[0].read_text()

    def until(self, step: int) -> None:
        """Wait for a checkpoint."""
        limit = time.monotonic() + 200
        while not (self.checkpoints / f"step-{step:08d}").exists():
            assert self.ranks[0].is_alive(), self.errors[0].read_text()[-3000:]
            assert time.monotonic() < limit, "no checkpoint in time"
            time.sleep(0.002)

    def stopped(self, number: int) -> tuple[int | None, str]:
        """Send all ranks a signal after the second checkpoint."""
        self.until(6)
        for process in self.ranks:
            os.kill(process.pid, number)
        return self.wait()

    def losses(self) -> list[float]:
        """The loss curve."""
        with open(self.adapter.with_name("log.csv"), newline="") as handle:
            return [float(row["loss"]) for row in csv.DictReader(handle)]

    def finished(self) -> dict:
        """The adapter of a run that is left to finish."""
        code, error = self.wait()
        assert code == 0, error[-3000:]
        return load_file(self.adapter)


@pytest.fixture(scope="module")
def start(processes, debug_run):
    return lambda out, ranks=1: Run(processes, debug_run, out, ranks)


@pytest.fixture(scope="module")
def whole_run(start, tmp_path_factory):
    """An uninterrupted run on one rank."""
    run = start(tmp_path_factory.mktemp("whole"))
    run.finished()
    return run


@pytest.fixture(scope="module")
def whole(whole_run):
    """Its adapter."""
    return load_file(whole_run.adapter)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_kill_9_and_the_same_command_give_the_same_bits(start, whole, tmp_path):
    code, _ = start(tmp_path).stopped(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "finetune" / "done.json").exists()
    assert equal(start(tmp_path).finished(), whole)


def test_sigterm_says_what_it_did(start, tmp_path):
    code, error = start(tmp_path).stopped(signal.SIGTERM)
    assert code == 143
    assert re.search(r"stopped by a signal after step \d+; checkpoint in", error)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(start, whole, tmp_path):
    """The kernel refuses to write more than half of a checkpoint's weights into any file, from the second one on."""
    run = start(tmp_path)
    run.until(3)
    size = (run.checkpoints / "step-00000003" / "weights.safetensors").stat().st_size
    resource.prlimit(run.ranks[0].pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    code, error = run.wait()
    assert code == 1
    assert re.search(r"checkpoint of step \d+ in .*weights\.safetensors could not be written .*is intact", error)
    left = sorted(path.name for path in run.checkpoints.iterdir())
    assert left
    assert all(re.fullmatch(r"step-\d{8}", name) for name in left), left
    assert equal(start(tmp_path).finished(), whole)


def test_two_ranks_killed_equal_two_ranks_and_nearly_one(start, whole_run, whole, tmp_path):
    run = start(tmp_path / "both", ranks=2)
    both = run.finished()
    assert run.losses() == pytest.approx(whole_run.losses(), rel=1e-5)
    assert len(run.losses()) == 12
    start(tmp_path / "cut", ranks=2).stopped(signal.SIGKILL)
    shutil.copytree(tmp_path / "cut", tmp_path / "fewer")
    assert equal(start(tmp_path / "cut", ranks=2).finished(), both)
    assert largest_difference(both, whole) < 1e-4
    assert largest_difference(start(tmp_path / "fewer").finished(), whole) < 1e-4


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)

"""A finished run of the debug recipe, shared by the tests; and a one-layer stage to test the loop with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory):
    """Folder of the debug recipe, run once in this session."""
    from train.config import load_recipe
    from train.run import run_recipe

    folder = tmp_path_factory.mktemp("debug")
    run_recipe(load_recipe("debug", [f"output={folder}"]))
    return folder


@pytest.fixture
def train_command():
    """Run `python -m train.run ...` (or torchrun with ranks=N) in a process of its own."""

    def run(*arguments: str, ranks: int = 1, env: dict[str, str] | None = None, timeout: float = 120):
        import os

        python = [sys.executable, "-m", "train.run"]
        if ranks > 1:
            python = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
            python += ["-m", "train.run"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.run(
            [*python, *map(str, arguments)], cwd=REPO, capture_output=True, text=True, env=variables, timeout=timeout
        )

    return run

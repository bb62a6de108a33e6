"""The node pack's types, checked as ComfyUI imports it: as one package, whose parts import each other relatively."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_nodes_and_dcgen_as_one_package(tmp_path):
    """`mypy` alone, as in `make lint`, sees `nodes` and `dcgen` apart and takes what passes between them for Any."""
    try:
        (tmp_path / "pack").symlink_to(ROOT, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir"]
    command += [str(tmp_path / "cache"), "--explicit-package-bases", "pack/nodes"]
    env = {**os.environ, "MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

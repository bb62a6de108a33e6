"""The script for a GPU, rehearsed without one: every job runs, and what it finds is written down."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.once_per_core
def test_rehearsal(comfy, tmp_path):
    command = [sys.executable, "-m", "benchmarks.comfy_gpu", "--cpu", "--turns", "2", "--comfy", str(comfy.root)]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "comfy_gpu.json").read_text())
    assert [row["ok"] for row in report["rows"]] == [True] * 7
    assert len(list(tmp_path.glob("*.png"))) == 8

"""Nothing that users run on MPS or DirectML makes a float64 tensor there: no_float64.py has the checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ("device", "dpmpp_solver", "consistency_solver", "quality", "extraction", "preview_factors", "sana")
CHECKS += ("autoencoder",)


@pytest.fixture(scope="module")
def results():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot pretend a device")
    command = [sys.executable, str(Path(__file__).with_name("no_float64.py"))]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_all_are_listed(results):
    assert set(results) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_no_float64(results, name):
    assert not results[name], results[name]

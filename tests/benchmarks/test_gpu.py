"""The GPU script, rehearsed: every branch gives right rows, a run goes on where one stopped, no job without time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.gpu import autoencoders, networks
from benchmarks.gpu.device import Device
from benchmarks.gpu.report import Job, Report, Row
from benchmarks.speed import MODELS
from dcgen.dcae.layers import RMSNorm

ROOT = Path(__file__).resolve().parents[2]
CPU = Device("cpu", small=True)


def run(out, *more):
    command = [sys.executable, "-m", "benchmarks.gpu", "--cpu", "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").is_file() else None


def test_rehearsal_and_resume(tmp_path):
    text, found = run(tmp_path)
    assert {row["part"] for row in found["rows"]} == {"correct", "autoencoder", "network", "training"}
    assert all(row["ok"] for row in found["rows"])
    assert all(row["error"] <= row["bound"] for row in found["rows"] if row["bound"] is not None)
    assert "0 wrong" in text
    _, again = run(tmp_path, "--parts", "correct", "training")
    assert again["rows"] == found["rows"]


def test_a_job_without_time_left_is_named_and_not_begun(tmp_path, capsys):
    report = Report(CPU, tmp_path / "gpu.json", minutes=0)
    report.run(Job("part", "a job", 5, lambda device: [Row("part", "never")]))
    assert not report.rows
    assert not report.done
    assert "a job: not run" in capsys.readouterr().out


def test_a_job_that_fails_gives_a_row_and_keeps_those_before(tmp_path):
    def rows(device):
        yield Row("part", "first", ms=1.0)
        raise RuntimeError("no kernel image")

    report = Report(CPU, tmp_path / "gpu.json", minutes=1)
    report.run(Job("part", "a job", 0, rows))
    report.run(Job("part", "another", 0, lambda device: [Row("part", "second")]))
    assert [(row.what, row.ok) for row in report.rows] == [("first", True), ("a job", False), ("second", True)]
    assert "no kernel image" in report.rows[1].note
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["what"] for row in stored["rows"]] == ["first", "a job", "second"]
    other = Report(Device("cpu", small=False), tmp_path / "gpu.json", minutes=1)
    assert not other.rows, "rows of another machine or size are not gone on with"


@pytest.mark.parametrize("kind", [networks.Int8Linear, networks.Fp8Linear])
def test_8_bit_layers_are_right_to_their_rounding(kind):
    if not kind.works(CPU):
        pytest.skip("this CPU has no such product")
    torch.manual_seed(1)
    layer = nn.Linear(128, 96).bfloat16()
    x = torch.randn(3, 40, 128).bfloat16()
    expected = layer(x).double()
    error = (kind(layer)(x).double() - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.05


@pytest.mark.parametrize("residual", [True, False])
def test_the_fused_norm_is_the_norm(residual):
    torch.manual_seed(2)
    norm = RMSNorm(24)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        x, more = torch.randn(2, 24, 5, 7), torch.randn(2, 24, 5, 7) if residual else None
        expected = norm(x.clone(), more)
        autoencoders.compile_norms(norm, "eager")
        torch.testing.assert_close(norm(x, more), expected, rtol=1e-5, atol=1e-6)


def test_the_tables_put_an_image_together(tmp_path):
    report = Report(CPU, tmp_path / "gpu.json", minutes=1)
    report.rows = [
        Row("network", "FLUX text encoder", ms=100.0),
        Row("network", "FLUX 4K DC-Gen step, bfloat16", ms=200.0),
        Row("autoencoder", "dc-ae-1.5-f64c128 decode 4096 px bfloat16, ours, strips by free memory", ms=300.0),
    ]
    (line,) = networks.tables(report)[1:]
    base, dcgen = MODELS["flux"].paper["H100 image"]["4K"]
    assert "FLUX 4K image" in line
    assert "4.40 s" in line  # 0.1 + 20 steps of 0.2 + 0.3
    assert f"{base} / {dcgen} s" in line

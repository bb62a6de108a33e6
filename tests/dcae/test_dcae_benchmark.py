"""benchmarks/dcae.py keeps every row of a run that is cut short, and goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import dcae as benchmark

NAME = "dc-ae-f32c32-in-1.0"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, shrunk, tmp_path: Path):
    """A function which runs the benchmark on a tiny network and returns the rows of its file."""
    monkeypatch.setattr(benchmark, "VARIANTS", {NAME: shrunk(NAME)})
    monkeypatch.setattr(benchmark, "LARGE", 256)
    out = tmp_path / "dcae.json"

    def call(*more: str) -> list[dict]:
        command = ["dcae.py", "--variants", NAME, "--sizes", "64", "128", "--threads", "1", "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", command)
        threads = torch.get_num_threads()
        try:
            benchmark.main()
        finally:
            torch.set_num_threads(threads)
        return json.loads(out.read_text())["rows"]

    call.out = out  # type: ignore[attr-defined]
    return call


def test_a_run_that_was_cut_short_goes_on(run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real, seen = benchmark.compare, []

    def compare(*args):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(args[3:5])
        return real(*args)

    monkeypatch.setattr(benchmark, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = json.loads(run.out.read_text())["rows"]
    assert [(row["direction"], row["size"]) for row in kept] == [("encode", 64), ("encode", 128), ("decode", 64)]
    monkeypatch.setattr(benchmark, "compare", real)
    rows = run()
    assert rows[:3] == kept
    assert [(row["direction"], row["size"]) for row in rows[3:]] == [("decode", 128), ("encode", 256), ("decode", 256)]
    assert run() == rows
    assert len(run("--strip", "2")) == len(rows) + 4  # other settings are other rows
    assert "diff. MiB" in capsys.readouterr().out


def test_a_row_says_what_the_ways_cost_and_that_they_agree(run) -> None:
    row = run("--ways", "strip")[0]
    assert set(row["seconds"]) == {"diffusers", "strip"}
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert 0 < row["relative_error"]["strip"] < 1e-4
    assert row["peak_bytes"]["diffusers"] == row["peak_bytes"]["tiled"]  # 64 pixels are one tile
    assert 0 < row["peak_bytes"]["strip"] <= row["formula_bytes"]
    assert (row["device"], row["dtype"], row["threads"], row["strip"], row["repeats"]) == ("cpu", "float32", 1, 1, 2)

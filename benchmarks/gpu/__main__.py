"""Everything that needs a GPU, in the minutes that one is at hand: is it right, how fast, how much memory.

    python -m benchmarks.gpu [--minutes 10] [--out runs/gpu] [--parts correct autoencoder network training]
    python -m benchmarks.gpu --cpu                  # rehearsal: every branch at tiny sizes, without a GPU

Needs torch, diffusers and transformers; random weights at the published shapes, so nothing is downloaded. Every row is
on screen and in OUT/gpu.json as soon as it is measured; the same command goes on where that file ends, on the same card
and torch. `vs` is the time over that of diffusers whole in the same job; `roof` is the time that this card's own matrix
product rate (first rows) needs for the row's operations, over the time measured. A job that does not fit into the time
left is named and not begun. Exit status 1 if a result was wrong or a job failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import diffusers
import torch

from benchmarks.gpu import autoencoders, correctness, networks, training
from benchmarks.gpu.device import Device, measure_rates
from benchmarks.gpu.report import COLUMNS, Report, Row

# By importance: what comes last is what a short run does not reach.
PHASES = (correctness.jobs, autoencoders.jobs, networks.jobs, training.jobs, autoencoders.further_jobs)
PARTS = (correctness.PART, autoencoders.PART, networks.PART, training.PART)
RECOMPILATIONS = 64  # of one kind of block or norm: every size and memory layout is one


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 when every row is right."""
    options = _parser().parse_args(arguments)
    if not options.cpu and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device; --cpu rehearses without one")
    diffusers.utils.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32 here
    device = Device("cpu" if options.cpu else "cuda", small=options.cpu)
    report = Report(device, options.out / "gpu.json", options.minutes)
    print(", ".join(f"{key} {value}" for key, value in report.facts.items()))
    print(COLUMNS)
    for row in rates(device):
        print(f"{row.part:12}{row.what}: {row.note}")
        report.facts[row.what] = row.note
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    for job in (job for phase in PHASES for job in phase(device)):
        if job.part in options.parts:
            report.run(job)
    for text in networks.tables(report):
        print(text)
    wrong = [row for row in report.rows if not row.ok]
    print(f"{len(report.rows)} rows, {len(wrong)} wrong; {report.file}")
    return 1 if wrong else 0


def rates(device: Device) -> Iterator[Row]:
    """The ceilings of this card, by a large product and a large copy."""
    for name, (rate, ms) in measure_rates(device).items():
        unit = f"{rate / 1e9:.0f} GB/s" if name == "copy" else f"{rate / 1e12:.1f} TFLOP/s"
        yield Row("rate", name, ms=ms, note=unit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no job begins that would end after this")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cpu", action="store_true", help="rehearse at tiny sizes without a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

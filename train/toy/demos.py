"""The recipes that `python -m train.demo` can run: their workflow in ComfyUI, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Demo:
    """Graph of the shipped workflow, and cost in rounds of choose_threads, measured on a 2-core CPU (AMD EPYC)."""

    workflow: str
    step: int  # of training
    fixed: int  # of cache and align
    output: str


DEMOS = {
    "toy-flux": Demo("workflows/api/dcgen_toy.json", 43, 2900, "runs/demo"),
    "toy-sana": Demo("workflows/api/dcgen_toy_sana.json", 6, 2900, "runs/demo-toy-sana"),
}

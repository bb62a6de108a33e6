"""The recipes that `python -m train.demo` can run: their workflow in ComfyUI, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Demo:
    """Graph of the shipped workflow, and cost in rounds of choose_threads, by processor time on an AMD EPYC."""

    workflow: str
    step: float  # of training
    fixed: int  # of cache and align
    output: str


DEMOS = {
    "toy-flux": Demo("workflows/api/dcgen_toy.json", 9, 1250, "runs/demo"),
    "toy-sana": Demo("workflows/api/dcgen_toy_sana.json", 1.4, 1250, "runs/demo-toy-sana"),
}

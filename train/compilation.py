"""torch.compile of a network's blocks, one by one: all blocks of a kind share one compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

Backend = Literal["inductor", "aot_eager"]
GRAPHS = 64  # of one kind of block: with and without gradient, one row or several


def compile_blocks(blocks: Sequence[nn.Module], backend: Backend = "inductor") -> None:
    """Compile the forward pass of each block in place, whole (fullgraph), before it is sharded.

    What hangs on a block from outside, hooks of FSDP2 or of a benchmark, and its recomputation stay outside of the
    graph, and parameters keep their names. Sizes are variables from the start: Eq. 7's second branch has another
    number of rows in each step, and recomputation fails where it meets a graph compiled after the forward pass.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend)  # type: ignore[method-assign]

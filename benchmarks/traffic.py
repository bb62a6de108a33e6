"""Count the bytes that operations read and write, as eager PyTorch runs them: the same number on any device.

    python -m benchmarks.traffic [--size 4096] [--out runs/traffic.json]

prints GiB for every DC-AE network in bfloat16: ours whole, in strips, and diffusers' AutoencoderDC.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.dcae import FAMILIES, models_of
from dcgen.dcae import VARIANTS, DCAEConfig
from dcgen.files import replacing

# Views under another name, and memory that nothing is written to.
_FREE = (torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_strided)

# The first argument is only written to, or only tells a shape.
_OVERWRITES = (torch.ops.aten.copy_, torch.ops.aten.zero_, torch.ops.aten.new_zeros)


class Traffic(TorchDispatchMode):
    """`with Traffic() as traffic: ...`, then `traffic.bytes`, and `traffic.by_operation` in the order of first use.

    An operation reads each of its inputs once and writes each of its outputs once; views are free. What a kernel reads
    again, or keeps in a cache, is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.by_operation.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not (func.is_view or func.overloadpacket in _FREE):
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            given = {key: value for key, value in kwargs.items() if key != "out"}  # written, not read
            read = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
            if func.overloadpacket in _OVERWRITES:
                read = read[1:]
            name = str(func.overloadpacket).removeprefix("aten.")
            moved = sum(map(_size, read)) + sum(map(_size, written))
            self.by_operation[name] = self.by_operation.get(name, 0) + moved
        return out


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; a broadcast one has fewer in memory."""
    stored = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        stored *= size if stride else 1
    return stored * tensor.element_size()


STRIP = 4  # latent rows


def measured(config: DCAEConfig, way: str, size: int) -> dict[str, int]:
    """Bytes of one way ("encode", "decode") at size x size pixels, by who computes it; without running anything."""
    oracle, ours = models_of(config, "meta", torch.bfloat16)
    side = size // config.spatial_factor
    shape = (1, 3, size, size) if way == "encode" else (1, config.latent_channels, side, side)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    calls: dict[str, Callable[[], object]] = {
        "whole": lambda: getattr(ours, way)(x),
        "strips": lambda: getattr(ours, way)(x, STRIP),
        "diffusers": lambda: getattr(oracle, way)(x),
    }
    found = {}
    for name, call in calls.items():
        with torch.no_grad(), Traffic() as traffic:
            call()
        found[name] = traffic.bytes
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="pixels a side")
    parser.add_argument("--variants", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--out", type=Path, default=Path("runs/traffic.json"))
    options = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()  # it warns of a cast that changes nothing here
    print(f"| {options.size} px, bfloat16, GiB | | whole | strips of {STRIP} rows | diffusers | whole / diffusers |")
    print("|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for name in options.variants:
        for way in ("decode", "encode"):
            found = measured(VARIANTS[name], way, options.size)
            cells = " | ".join(f"{value / 2**30:.0f}" for value in found.values())
            print(f"| {name} | {way} | {cells} | {found['whole'] / found['diffusers']:.2f} |", flush=True)
            rows.append({"variant": name, "direction": way, "size": options.size, **found})
    with replacing(options.out) as temporary:
        Path(temporary).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

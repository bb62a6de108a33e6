"""The device of a run: its clock, its memory, and how fast it multiplies and copies."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

LEAST_RUNS, SECONDS, MOST_SECONDS = 3, 1.0, 5.0  # of one measurement


@dataclass
class Device:
    """A GPU at true sizes, or a CPU at tiny ones (`small`, the rehearsal)."""

    kind: str
    small: bool
    rates: dict[str, float] = field(default_factory=dict)
    """Measured multiply-add rate in FLOP/s by dtype name; empty before `measure_rates`."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def place(self) -> dict[str, Any]:
        return {"device": torch.device(self.kind), "dtype": self.dtype}

    @property
    def cuda(self) -> bool:
        return self.kind == "cuda"

    def facts(self) -> dict[str, Any]:
        """What the figures depend on."""
        found: dict[str, Any] = {"torch": torch.__version__, "small": self.small, "cuda": torch.version.cuda}
        if not self.cuda:
            return {**found, "name": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"}
        card = torch.cuda.get_device_properties(0)
        return {**found, "name": card.name, "gib": round(card.total_memory / 2**30, 1)}

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object], warm: int = 1) -> float:
        """Median time of a call in ms, by device events on a GPU.

        As many runs as fit into SECONDS, at least three; of slow calls as many as fit into MOST_SECONDS, at least one.
        """
        for _ in range(warm):
            call()
        self.synchronize()
        times: list[float] = []
        begin = time.perf_counter()
        while not times or (not self.small and self._goes_on(len(times), time.perf_counter() - begin)):
            times.append(self._once(call))
        return statistics.median(times)

    @staticmethod
    def _goes_on(runs: int, seconds: float) -> bool:
        return seconds < SECONDS or (runs < LEAST_RUNS and seconds < MOST_SECONDS)

    def _once(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - begin)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def peak_gib(self, call: Callable[[], object]) -> float | None:
        """Most GiB allocated during a call over what was allocated before it; None where there is no GPU."""
        if not self.cuda:
            call()
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def roof(self, flops: int, ms: float, dtype: str = "bfloat16") -> float | None:
        """Time that the measured rate needs for so many operations, over ms."""
        rate = self.rates.get(dtype)
        return flops / rate * 1000 / ms if rate else None


def measure_rates(device: Device) -> dict[str, tuple[float, float]]:
    """(rate, ms) by name: FLOP/s of a large matrix product in bfloat16 and float16, bytes/s of a large copy."""
    side = 256 if device.small else 8192
    found: dict[str, tuple[float, float]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        # random: products of zeros can run faster than those of data
        a, b = (torch.randn(side, side, device=device.kind, dtype=torch.float32).to(dtype) for _ in range(2))
        ms = device.milliseconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        found[name] = (2 * side**3 / ms * 1000, ms)
    source = torch.randn(1 << (20 if device.small else 28), device=device.kind)
    target = torch.empty_like(source)
    ms = device.milliseconds(lambda: target.copy_(source))
    found["copy"] = (2 * source.nbytes / ms * 1000, ms)
    device.rates = {name: rate for name, (rate, _) in found.items()}
    return found

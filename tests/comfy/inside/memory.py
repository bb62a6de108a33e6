"""Run inside ComfyUI: how much memory loading a sharded release takes at its highest."""

import gc
from pathlib import Path

from flux import load_model

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(field):
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(field)).split()[1])


def peak(pack, tensors, params):
    load_model(pack, params["warm"])  # imports, and what the allocator keeps for itself
    gc.collect()
    before = _kilobytes("VmRSS")
    RESET.write_text("5")  # the high-water mark starts again from here
    model = load_model(pack, params["release"])
    highest = _kilobytes("VmHWM") - before
    weights = sum(value.nbytes for value in model.model.diffusion_model.parameters())
    return {}, {"peak": highest * 1024, "weights": weights}

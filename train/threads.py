"""How many threads a run on the CPU takes: found by a short measurement. Import before torch.

On a machine that others use too, several threads wait for each other at every layer, and by default they wait by
spinning: two threads then took twelve times as long a step as one.
"""

from __future__ import annotations

import copy
import functools
import os
import statistics
import time

# Read by OpenMP when torch is loaded: threads that wait go to sleep.
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS, TOKENS, WIDTH, HEADS = 1024, 32, 192, 6  # the toy: 32 images of 16 latent and 16 text tokens
LAYERS = 2
ROUNDS = 15
GAIN = 0.8  # more threads must take at most this part of the time: on a busy machine the measure is uncertain


def choose_threads() -> tuple[int, float]:
    """(threads, seconds of one round): the number that torch now uses. OMP_NUM_THREADS, where set, decides.

    Every round tries all numbers in turn, so that a burst of other work meets all of them.
    """
    limit = torch.get_num_threads()
    given = "OMP_NUM_THREADS" in os.environ
    numbers = [limit] if given else sorted({1, min(4, limit), limit})
    times: dict[int, list[float]] = {number: [] for number in numbers}
    for number in [number for _ in range(ROUNDS + 1) for number in numbers]:
        torch.set_num_threads(number)
        times[number].append(_round())
    seconds = {number: statistics.median(rounds[1:]) for number, rounds in times.items()}  # the first warms up
    best = fastest(seconds)
    torch.set_num_threads(best)
    return best, seconds[best]


def fastest(seconds: dict[int, float]) -> int:
    """The number of threads to take: more only where they clearly gain."""
    best, *more = sorted(seconds)
    for number in more:
        if seconds[number] < GAIN * seconds[best]:
            best = number
    return best


def _round() -> float:
    """Seconds of a forward and backward pass through transformer layers of the toy's size, in the toy's dtype.

    Many small operations beside the matrix products: those alone rise with the threads and with the processor's
    bfloat16 units as a training step does not.
    """
    layers = _layers()
    x = torch.ones(ROWS // TOKENS, TOKENS, WIDTH, dtype=torch.bfloat16)
    begin = time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH):
        layers(x).float().square().mean().backward()
    return time.perf_counter() - begin


@functools.cache
def _layers() -> nn.Module:
    with torch.random.fork_rng([]):
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        return nn.Sequential(*[copy.deepcopy(layer) for _ in range(LAYERS)]).bfloat16()

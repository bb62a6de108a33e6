"""How many threads a run on the CPU takes: found by a short measurement. Import before torch.

On a machine that others use too, several threads wait for each other at every layer, and by default they wait by
spinning: two threads then took twelve times as long a step as one.
"""
# R rows, C width

from __future__ import annotations

import os
import statistics
import time

# Read by OpenMP when torch is loaded: threads that wait go to sleep.
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

ROWS, WIDTH = 1024, 192  # the toy: 32 images of 16 latent and 16 text tokens
LAYERS = 8
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
    """Seconds of a forward and backward pass through layers of the toy's size, in the toy's dtype."""
    x = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.full(shape, 0.01, dtype=torch.bfloat16) for shape in ((4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))]
    begin = time.perf_counter()
    y = x
    for _ in range(LAYERS):
        y = y + F.linear(F.gelu(F.linear(y, weights[0])), weights[1])
    y.float().square().mean().backward()
    return time.perf_counter() - begin

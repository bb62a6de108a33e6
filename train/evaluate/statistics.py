"""How sure a result of some prompts and raters is: bootstrap intervals, sign test, agreement between raters."""
# n observations, G clusters, R resamples, U units, C categories

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (`low`, `high`) at LEVEL, from `count` observations."""

    value: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float | int | None]:
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{key: _finite(number) for key, number in numbers.items()}, "count": self.count}


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of `values` and its percentile interval when whole clusters are drawn with replacement.

    Observations of one prompt are not independent, so the prompt is the cluster (Davison and Hinkley 1997, 3.8). The
    interval is NaN for fewer than two clusters. ValueError for no values or lengths that differ.
    """
    sums, counts = _by_cluster(values, clusters)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(mean, math.nan, math.nan, len(values))
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for number in range(resamples):  # one at a time: 30,000 prompts times 2,000 resamples do not fit in memory
        drawn = rng.integers(len(sums), size=len(sums))
        means[number] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), len(values))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of the sign test, P(as uneven or more | both equally likely); ties are left out before.

    1.0 where nothing is left.
    """
    total, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float:
    """Krippendorff's alpha for nominal data: 1 = full agreement, 0 = as by chance; NaN where it is not defined.

    units: the answers that each unit got, in any order; units with fewer than two do not count. alpha = 1 - D_o / D_e
    with the observed and the expected disagreement of pairs (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability").
    """
    tables = [Counter(answers) for answers in units if len(answers) > 1]
    total = sum(sum(table.values()) for table in tables)
    categories: Counter[Hashable] = Counter()
    observed = 0.0
    for table in tables:
        size = sum(table.values())
        observed += (size**2 - sum(count**2 for count in table.values())) / (size - 1)
        categories += table
    expected = (total**2 - sum(count**2 for count in categories.values())) / (total - 1) if total > 1 else 0.0
    return 1 - observed / expected if expected else math.nan


def _by_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster, (G,) each."""
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values with {len(clusters)} clusters: expected as many of each, and some")
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([places[cluster] for cluster in clusters])
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    return sums, np.bincount(index).astype(np.float64)


def _finite(number: float) -> float | None:
    """The number as JSON has it, which knows no NaN."""
    return number if math.isfinite(number) else None

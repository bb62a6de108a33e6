"""Intervals against their coverage and a closed form, the sign test against enumeration, alpha against its source."""

import itertools
import math
import random

import numpy as np
import pytest

from train.evaluate.statistics import cluster_bootstrap, krippendorff_alpha, sign_test


def test_the_interval_of_independent_values_has_the_width_of_the_normal_one():
    rng = np.random.default_rng()
    values = rng.normal(3.0, 2.0, size=900)
    found = cluster_bootstrap(values, range(900))
    half = 1.959964 * values.std(ddof=1) / 30
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)


def test_repeated_answers_of_a_prompt_add_no_certainty():
    """20 equal answers of each prompt are worth one: an unclustered interval would be sqrt(20) times too narrow."""
    rng = np.random.default_rng()
    prompts = rng.normal(size=60)
    repeated = np.repeat(prompts, 20)
    of_prompts = cluster_bootstrap(prompts, range(60), seed=1)
    clustered = cluster_bootstrap(repeated, np.repeat(np.arange(60), 20).tolist(), seed=1)
    assert (clustered.low, clustered.high) == pytest.approx((of_prompts.low, of_prompts.high), rel=1e-9)
    naive = cluster_bootstrap(repeated, range(1200))
    assert (clustered.high - clustered.low) > 3 * (naive.high - naive.low)


def test_clusters_of_different_sizes_weigh_by_their_answers():
    assert cluster_bootstrap([1, 0, 0, 0], ["a", "b", "b", "b"]).value == 0.25
    assert math.isnan(cluster_bootstrap([1, 0], ["a", "a"]).low)
    with pytest.raises(ValueError, match="2 values with 1 clusters"):
        cluster_bootstrap([1, 2], ["a"])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """95 % intervals of 40 prompts with 5 answers each: of 200, about 187 cover (percentile intervals fall short)."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        values = np.repeat(rng.normal(size=40), 5) + rng.normal(size=200)
        found = cluster_bootstrap(values, np.repeat(np.arange(40), 5).tolist(), resamples=300)
        covered += found.low <= 0 <= found.high
    assert 175 <= covered <= 199


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 4), (9, 2), (2, 9), (6, 6)])
def test_the_sign_test_equals_the_enumeration_of_all_outcomes(wins, losses):
    total = wins + losses
    outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=total)]
    extreme = sum(abs(heads - total / 2) >= abs(wins - total / 2) for heads in outcomes)
    assert sign_test(wins, losses) == pytest.approx(extreme / len(outcomes), rel=1e-12)


def test_the_sign_test_of_many_answers_is_a_number():
    assert sign_test(700, 800) == pytest.approx(0.0105, abs=5e-4)  # normal approximation with continuity: 0.01057


# Krippendorff (2011), section C: nominal alpha of these four observers is .743.
OBSERVERS = (
    "1 2 3 3 2 1 4 1 2 * * *",
    "1 2 3 3 2 2 4 1 2 5 * 3",
    "* 3 3 3 2 3 4 2 2 5 1 *",
    "1 2 3 3 2 4 4 1 2 5 1 *",
)


def test_alpha_of_the_published_example():
    columns = zip(*(row.split() for row in OBSERVERS), strict=True)
    units = [[value for value in column if value != "*"] for column in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_equals_its_definition_by_pairs():
    random.seed()
    units = [[random.choice("abb=") for _ in range(random.randint(1, 7))] for _ in range(30)]
    used = [unit for unit in units if len(unit) > 1]
    pooled = [value for unit in used for value in unit]
    observed = sum(sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in used) / len(
        pooled
    )
    expected = sum(a != b for a, b in itertools.permutations(pooled, 2)) / len(pooled) / (len(pooled) - 1)
    assert krippendorff_alpha(units) == pytest.approx(1 - observed / expected, rel=1e-9)


def test_alpha_at_its_ends():
    assert krippendorff_alpha(["aaa", "bbb"]) == 1
    assert math.isnan(krippendorff_alpha(["aaa", "aaa"]))
    assert math.isnan(krippendorff_alpha(["a", "b"]))
    assert krippendorff_alpha(["ab"] * 50) < 0


def test_alpha_equals_the_library():
    library = pytest.importorskip("krippendorff", reason="the library krippendorff is not installed")
    rng = np.random.default_rng()
    table = rng.integers(0, 3, size=(8, 40))
    units = [column.tolist() for column in table.T]
    expected = library.alpha(reliability_data=table, level_of_measurement="nominal")
    assert krippendorff_alpha(units) == pytest.approx(float(expected), rel=1e-6)

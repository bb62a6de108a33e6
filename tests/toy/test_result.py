"""The toy's result, measured: alignment beats no alignment, and the shipped adapter beats alignment.

`benchmarks/toy.py` is the long form over three seeds (figures in toy/README.md); the margins here are a fraction of the
differences found there, many times the spread between seeds.
"""

import pytest
import torch

from benchmarks.toy import draw, untrained
from dcgen.adapter import save_adapter
from train.config import load_recipe
from train.evaluate.judge import Judge
from train.generate import Pipeline
from train.run import run_recipe

SEED = 3  # none of the benchmark's


@pytest.fixture(scope="module")
def scores(root, tmp_path_factory):
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost more than they bring
    folder = tmp_path_factory.mktemp("result")
    toy = root / "toy"
    recipe = load_recipe(
        "toy-flux",
        [
            f"output={folder}",
            f"seed={SEED}",
            "device=cpu",
            f"defaults.base={toy / 'flux-base'}",
            f"defaults.autoencoder={toy / 'dc-ae-f32'}",
            f"cache.data.path={toy / 'data'}",
            "cache.data.variants=1",
            "head.steps=60",
        ],
    )
    for stage in ("cache", "align", "head"):
        run_recipe(recipe, only=stage)
    save_adapter(folder / "untrained.safetensors", untrained(recipe, SEED))
    adapters = {
        "untrained": folder / "untrained.safetensors",
        "aligned": recipe.folder / "head" / "adapter.safetensors",
        "shipped": toy / "adapter" / "toy-flux-dcgen.safetensors",
    }
    judge = Judge(toy / "evaluator", toy / "data", variants=2)
    held = set(judge.pictures.pairs("held_out"))
    pairs = [pair for number, pair in enumerate(judge.pictures.pairs("all")) if number % 6 == 0 or pair in held]
    found = {}
    for name, adapter in adapters.items():
        pipeline = Pipeline(toy / "flux-base", adapter=adapter, autoencoder=toy / "dc-ae-f32")
        found[name] = judge.score(draw(pipeline, judge, pairs, SEED), pairs)
    return found


def test_each_stage_brings_the_pictures_nearer_to_real_ones(scores):
    assert scores["aligned"].frechet < 0.75 * scores["untrained"].frechet
    assert scores["shipped"].frechet < 0.5 * scores["aligned"].frechet


def test_alignment_alone_already_follows_the_prompt_in_color(scores):
    assert scores["aligned"].color > scores["untrained"].color + 0.2


def test_the_shipped_adapter_shows_what_the_prompt_says(scores):
    assert scores["shipped"].both > scores["aligned"].both + 0.4
    assert scores["shipped"].both > 0.7
    assert scores["shipped"].both_held_out > 0.5

"""Is each stage of DC-Gen worth it on the toy? `python -m benchmarks.toy [--seeds 0 1 2] [--out runs/toy-benchmark]`.

For every seed the recipe toy-flux is trained with and without embedding alignment; each model draws every caption once
and is judged against real pictures no training saw. Prints a table and writes results.json.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from dcgen.adapter import Adapter, save_adapter
from train.autoencoders import latent_space, load_autoencoder
from train.config import Recipe, load_recipe
from train.evaluate import FIRST_UNSEEN, Judge
from train.files import write_json
from train.generate import Pipeline
from train.models import base_backbone, fresh_ends
from train.run import run_recipe
from train.toy.pictures import SIZE, Pair

GUIDANCE, STEPS = 3.5, 20
ARMS = {
    "no alignment": "new embedder and head as initialised",
    "alignment only": "Eq. 1, then embedder and head on Eq. 7",
    "finetuned, no alignment": "LoRA, embedder and head on Eq. 7 from random",
    "finetuned": "the whole of DC-Gen",
}
COLUMNS = ("frechet", "subject", "color", "both", "both_held_out")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    begin = time.perf_counter()
    recipe = load_recipe("toy-flux", [f"output={options.out}", *options.overrides])
    run_recipe(recipe, only="cache")
    judge = Judge(options.evaluator, recipe.stages["cache"].data.path)
    pairs = judge.pictures.pairs("all")[:: options.every]
    rows: dict[str, list[dict[str, float]]] = {"real pictures": [judge.score(_real(judge, pairs), pairs).as_dict()]}
    rows |= {name: [judge.score(x, pairs).as_dict()] for name, x in _references(recipe, judge, pairs).items()}
    for seed in options.seeds:
        for name, adapter in train_arms(recipe, seed, options.overrides).items():
            pipeline = Pipeline(recipe.stages["cache"].base, adapter=adapter, autoencoder=_student(recipe))
            rows.setdefault(name, []).append(judge.score(draw(pipeline, judge, pairs, seed), pairs).as_dict())
            print(f"seed {seed}, {name}: {rows[name][-1]}", flush=True)
    print(table(rows))
    write_json(
        options.out / "results.json",
        {
            "seeds": list(options.seeds),
            "captions": len(pairs),
            "guidance": GUIDANCE,
            "steps": STEPS,
            "stages": {name: stage.model_dump(mode="json") for name, stage in recipe.stages.items()},
            "arms": ARMS,
            "scores": rows,
            "summary": {name: summary(scores) for name, scores in rows.items()},
            "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
            "seconds": round(time.perf_counter() - begin, 1),
        },
    )


def train_arms(recipe: Recipe, seed: int, overrides: Sequence[str]) -> dict[str, Path]:
    """Train (or find done) what one seed needs; the adapter of every arm."""
    common = [*overrides, f"seed={seed}", f"defaults.cache={recipe.folder}/cache"]
    whole = load_recipe("toy-flux", [*common, f"output={recipe.folder}/seed-{seed}"])
    for stage in ("align", "head", "finetune"):
        run_recipe(whole, only=stage)
    bare = load_recipe("toy-flux", [*common, f"output={recipe.folder}/seed-{seed}-bare", "finetune.start=''"])
    run_recipe(bare, only="finetune")
    nothing = bare.folder / "untrained.safetensors"
    save_adapter(nothing, untrained(recipe, seed))
    return {
        "no alignment": nothing,
        "alignment only": whole.folder / "head" / "adapter.safetensors",
        "finetuned, no alignment": bare.folder / "finetune" / "adapter.safetensors",
        "finetuned": whole.folder / "finetune" / "adapter.safetensors",
    }


def untrained(recipe: Recipe, seed: int) -> Adapter:
    """The base with an embedder and a head as they are initialised."""
    backbone, config = base_backbone(recipe.stages["cache"].base)
    space = latent_space(_student(recipe))
    _, embedder, head = fresh_ends(backbone, config, space.channels, 1, seed)
    ends = ((backbone.embedder, embedder), (backbone.head, head))
    tensors = {f"{path}.{name}": tensor for path, end in ends for name, tensor in end.state_dict().items()}
    return Adapter(
        backbone=backbone.name,
        tensors=tensors,
        lora={},
        latent=space,
        base=backbone.fingerprint(config),
        schedule=dict(recipe.stages["head"].schedule),
    )


def draw(pipeline: Pipeline, judge: Judge, pairs: Sequence[Pair], seed: int) -> Tensor:
    """One picture (3,H,W) in -1..1 for each caption, in batches of 32."""
    images = []
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        noise = [100_000 * (seed + 1) + start + k for k in range(len(part))]
        images.append(pipeline.images(judge.captions(part), noise, SIZE, SIZE, steps=STEPS, guidance=GUIDANCE))
    return torch.cat(images)


def _real(judge: Judge, pairs: Sequence[Pair]) -> Tensor:
    """Other real pictures of the same captions: the floor of every column."""
    return torch.stack([judge.pictures.draw(pair, FIRST_UNSEEN + judge.variants) for pair in pairs])


def _references(recipe: Recipe, judge: Judge, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The base at f8, and real pictures through either autoencoder."""
    base = Pipeline(recipe.stages["cache"].base)
    real = _real(judge, pairs)
    student = load_autoencoder(_student(recipe))
    return {
        "real through the f8 VAE": _through(base.autoencoder, real),
        "real through the DC-AE": _through(student, real),
        "base (f8, 64 tokens)": draw(base, judge, pairs, 0),
    }


def _through(autoencoder: Any, images: Tensor) -> Tensor:
    return torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in images.split(32)])


def _student(recipe: Recipe) -> str:
    return recipe.stages["cache"].autoencoder


def summary(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and spread (sample standard deviation) of every column."""
    return {
        column: {
            "mean": round(mean(row[column] for row in scores), 4),
            "spread": round(stdev(row[column] for row in scores), 4) if len(scores) > 1 else 0.0,
        }
        for column in COLUMNS
    }


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """The rows as a Markdown table, mean ± spread over the seeds."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, scores in rows.items():
        cells = [f"{part['mean']:.3f} ± {part['spread']:.3f}" for part in summary(scores).values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe toy-flux")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/toy-benchmark"))
    parser.add_argument("--evaluator", type=Path, default=Path("toy/evaluator"))
    parser.add_argument("--every", type=int, default=1, help="draw every n-th caption only")
    return parser


if __name__ == "__main__":
    main()

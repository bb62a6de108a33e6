"""Does DC-Gen carry a class-conditional DiT over? `python -m benchmarks.toy_dit [--run runs/toy-dit]`.

Runs the recipe toy-dit where it is not done, then lets the base, the aligned and the finetuned model draw every class
eight times by true CFG. The judge is the toy's: how often the class is recognised, and the Fréchet distance to real
pictures that no training saw. Prints a table and writes RUN/results.json.
"""
# B pictures

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.autoencoders import load_autoencoder
from train.config import load_recipe
from train.evaluate.judge import FIRST_UNSEEN, Judge
from train.files import write_json
from train.generate import Pipeline
from train.run import run_recipe
from train.toy.pictures import SIZE

STEPS = 25
COLUMNS = {"frechet": "Fréchet distance ↓", "subject": "class recognised ↑"}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    recipe = load_recipe("toy-dit", [f"output={options.run}", *options.overrides])
    run_recipe(recipe)
    student = recipe.stages["cache"].autoencoder
    judge = Judge(options.evaluator, recipe.stages["cache"].data.path)
    pairs = judge.pictures.pairs("all")  # each class on each colour: the judge's real pictures; only the class is asked
    classes = [judge.pictures.subjects[pair.subject] for pair in pairs]
    real = torch.stack([judge.pictures.draw(pair, FIRST_UNSEEN + judge.variants) for pair in pairs])
    base = recipe.folder / "pretrain" / "release"

    def moved(stage: str) -> Tensor:
        adapter = recipe.folder / stage / "adapter.safetensors"
        return _draw(Pipeline(base, adapter=adapter, autoencoder=student), classes, options.guidance)

    deep = load_autoencoder(student)
    pictures = {
        "real pictures": real,
        "real through the DC-AE": torch.cat([deep.decode(deep.encode(part)) for part in real.split(32)]),
        "base (f8, 64 tokens)": _draw(Pipeline(base), classes, options.guidance),
        "alignment only (f32, 16 tokens)": moved("head"),
        "finetuned (f32, 16 tokens)": moved("finetune"),
    }
    rows: dict[str, Any] = {}
    for name, images in pictures.items():
        score = judge.score(images, pairs).as_dict()
        rows[name] = {column: score[column] for column in COLUMNS}
    print("| | " + " | ".join(COLUMNS.values()) + " |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    write_json(recipe.folder / "results.json", {"guidance": options.guidance, "steps": STEPS, "rows": rows})


def _draw(pipeline: Pipeline, classes: Sequence[str], guidance: float) -> Tensor:
    """One picture (3,H,W) in -1..1 for each name, in batches of 32."""
    images = []
    for start in range(0, len(classes), 32):
        part = classes[start : start + 32]
        seeds = range(start, start + len(part))
        picture = pipeline.images(part, list(seeds), SIZE, SIZE, steps=STEPS, guidance=1.0, cfg_w=guidance - 1)
        images.append(picture)
    return torch.cat(images)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--run", type=Path, default=Path("runs/toy-dit"))
    parser.add_argument("--evaluator", type=Path, default=Path("toy/evaluator"))
    parser.add_argument("--guidance", type=float, default=2.0, help="g = 1 + w of true CFG (Eq. 4)")
    return parser


if __name__ == "__main__":
    main()

"""What each part of DC-Gen is worth on the toy: `python -m benchmarks.toy [--seeds 0 1 2] [--arms eq2 full ...]`.

Every arm trains the recipe toy-flux (or --recipe toy-sana) with one thing changed; each model draws every caption once
and is judged against real pictures that no training saw. The toy SANA is sampled by true CFG at the same g = 3.5. One
JSON for each arm and seed: what is done is not trained again, so the command may be stopped and repeated, with more
arms or seeds. Prints a table, writes results.json, and a picture with --figure.
"""
# B pictures, C latent channels, h w latent rows and columns

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from dcgen import guidance
from dcgen.adapter import Adapter, save_adapter
from dcgen.folder import autoencoder_space
from dcgen.release import open_model
from train.autoencoders import load_autoencoder
from train.config import Recipe, load_recipe, parse_recipe
from train.evaluate.judge import FIRST_UNSEEN, Judge, frechet
from train.files import digest_json, read_json, write_json
from train.generate import Pipeline
from train.log import save_png
from train.models import fresh_ends, read_base
from train.run import config_hash, run_recipe
from train.sample import grid, seeded_noise
from train.toy.pictures import SIZE, Pair

GUIDANCE, STEPS = 3.5, 20
COLUMNS = {
    "frechet": "Fréchet distance ↓",
    "subject": "subject ↑",
    "color": "colour ↑",
    "both": "both ↑",
    "both_held_out": "both, unseen pairs ↑",
    "cfg_gap": "velocity to true CFG ↓",
    "frechet_cfg": "Fréchet to true CFG ↓",
}
FLOW = ("head.objective.loss=flow", "finetune.objective.loss=flow")
RANDOM_W = ("head.objective.flow_guidance=w", "finetune.objective.flow_guidance=w")
REFERENCE = "eq2"  # its two passes are true CFG in the new latent space: raw velocities, trained by Eq. 2 at g = 1


@dataclass(frozen=True)
class Arm:
    """A way of training (`changes` to toy-flux, in folder seed-N`suffix`) and the stage whose model draws."""

    title: str
    about: str
    suffix: str = ""
    stages: tuple[str, ...] = ("align", "head", "finetune")
    changes: tuple[str, ...] = ()
    two_passes: bool = False
    against_cfg: bool = False  # whether its one pass is compared with true CFG
    ae_ratio: float | None = None


BARE = ("finetune.start=''",)
MAIN = {
    "none": Arm("no alignment", "new embedder and head as initialised", "-bare", ()),
    "aligned": Arm("alignment only", "Eq. 1, then embedder and head on Eq. 7 (SANA: Eq. 2)", "", ("align", "head")),
    "bare": Arm(
        "finetuned, no alignment",
        "LoRA, embedder and head on Eq. 7 (SANA: Eq. 2) from random",
        "-bare",
        ("finetune",),
        BARE,
    ),
    "finetuned": Arm("DC-Gen", "the whole of it: Eq. 1, head, LoRA on Eq. 7 (SANA: Eq. 2)", against_cfg=True),
    "eq2": Arm(
        "Eq. 2 at g = 1",
        "flow matching instead of Eq. 7, guidance embedding fixed at 1",
        "-eq2",
        changes=FLOW,
        against_cfg=True,
    ),
    "eq2-w": Arm(
        "Eq. 2 at random g",
        "flow matching, guidance embedding drawn as in Eq. 7",
        "-eq2-w",
        changes=FLOW + RANDOM_W,
        against_cfg=True,
    ),
    "eq2-cfg": Arm("true CFG", "the Eq. 2 model, two passes a step (Eq. 4)", "-eq2", changes=FLOW, two_passes=True),
}
# Fig. 5, Tables 9 and 10. Where the paper gives no number (how long alpha grows), the choice is said here.
STRATEGIES = {
    "full": Arm(
        "full finetuning", "every weight, at a quarter of the LoRA's learning rate (Fig. 5)", "-full",
        changes=("finetune.train=full", "finetune.optimizer.lr=1.0e-3"),
    ),
    "frozen-first": Arm(
        "frozen backbone first", "head stage from random ends, then LoRA (Table 9)", "-frozen-first",
        ("head", "finetune"), ("head.start=''",),
    ),
    "layer-lr": Arm(
        "layer-wise learning rate", "1:3 from first to last block, from random ends (Table 9)", "-layer-lr",
        ("finetune",), (*BARE, "finetune.layer_lr_ratio=3"),
    ),
    "gradual-lora": Arm(
        "gradual LoRA", "alpha grows over half the steps, from random ends (Table 9)", "-gradual-lora",
        ("finetune",), (*BARE, "finetune.alpha_warmup=300"),
    ),
    **{
        f"ae-{ratio:g}": Arm(
            f"autoencoder aligned, {ratio:g}", "DC-AE pulled to the f8 latent, then random ends (Table 10)",
            f"-ae-{ratio:g}", ("finetune",), BARE, ae_ratio=ratio,
        )
        for ratio in (0.1, 1.0, 10.0)
    },
}  # fmt: skip
ARMS = MAIN | STRATEGIES
DISTILLED = ("eq2", "eq2-w", "eq2-cfg")  # arms that ask how to train a guidance-distilled base, which SANA is not
AE_STEPS, AE_BATCH = 200, 16


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    out = options.out or Path("runs") / f"{options.recipe}-benchmark".replace("toy-flux-", "toy-")
    bench = Bench(out, options.overrides, options.evaluator, options.every, options.recipe)
    arms = bench.arms(options.arms)
    bench.references()
    for seed in options.seeds:
        for name in arms:
            scores = bench.score(name, seed)
            print(f"seed {seed}, {ARMS[name].title}: {scores}", flush=True)
    results = bench.results()
    print(table(results["rows"]))
    write_json(out / "results.json", results)
    if options.figure:
        figure(results["rows"], bench.strips(), options.figure)


class Bench:
    """Trains and scores arms in `out`: what is there already, made with the same settings, is taken as it is."""

    def __init__(
        self, out: Path, overrides: Sequence[str], evaluator: Path, every: int = 1, recipe: str = "toy-flux"
    ) -> None:
        self.out, self.overrides, self.name = out, tuple(overrides), recipe
        self.recipe = load_recipe(recipe, [f"output={out}", *self.overrides])
        run_recipe(self.recipe, only="cache")
        cache = self.recipe.stages["cache"]
        self.base: str = cache.base
        self.teacher: str | None = cache.teacher or None
        self.distilled = read_base(self.base)[1].distilled
        self.judge = Judge(evaluator, self.recipe.stages["cache"].data.path)
        self.pairs = self.judge.pictures.pairs("all")[::every]
        self.captions = self.judge.captions(self.pairs)
        self.guided: dict[int, Tensor] = {}  # features of the reference's pictures by true CFG, by seed

    def arms(self, wanted: Sequence[str] | None) -> list[str]:
        """The arms to run: those asked for, else the main ones that mean something on this base."""
        if wanted is None:
            return [name for name in MAIN if self.distilled or name not in DISTILLED]
        if not self.distilled and set(wanted) & set(DISTILLED):
            raise SystemExit(f"--arms {', '.join(DISTILLED)} are about a distilled base; {self.base} is none")
        return list(wanted)

    def references(self) -> dict[str, dict[str, float]]:
        """Scores of real pictures, of both autoencoders, and of the base at f8."""

        def make() -> dict[str, Any]:
            real = torch.stack([self.judge.pictures.draw(p, FIRST_UNSEEN + self.judge.variants) for p in self.pairs])
            base = self._pipeline(autoencoder=self.teacher)
            pictures = {
                "real pictures": real,
                "real through the f8 VAE": _through(base.autoencoder, real),
                "real through the DC-AE": _through(load_autoencoder(self.student(None)), real),
                "base (f8, 64 tokens)": draw(base, self.judge, self.pairs, 0),
            }
            return {name: self.judge.score(images, self.pairs).as_dict() for name, images in pictures.items()}

        return self._once("references", self._setting([self.base, self.student(None)]), make)

    def score(self, name: str, seed: int) -> dict[str, float]:
        """Train what the arm needs and judge it; both only if it was not done before."""
        arm = ARMS[name]
        recipe = self.arm_recipe(arm, seed)
        made_of = config_hash(recipe, arm.stages[-1]) if arm.stages else [recipe.seed, self.base]

        def make() -> dict[str, float]:
            pipeline = self.pipeline(name, seed)
            images = draw(pipeline, self.judge, self.pairs, seed, arm.two_passes)
            save_png(self._path(name, seed).with_suffix(".png"), grid(self._samples(images), 8))
            return self.judge.score(images, self.pairs).as_dict()

        def against_cfg() -> dict[str, float]:
            pipeline, reference = self.pipeline(name, seed), self.pipeline(REFERENCE, seed)
            if seed not in self.guided:
                self.guided[seed] = self.judge.features(draw(reference, self.judge, self.pairs, seed, True))
            images = draw(pipeline, self.judge, self.pairs, seed)
            distance = frechet(self.judge.features(images), self.guided[seed])
            return {"cfg_gap": round(self.cfg_gap(pipeline, reference), 4), "frechet_cfg": round(distance, 4)}

        settings = self._setting([name, made_of])
        scores = self._once(self._path(name, seed).stem, settings, make)
        if self.distilled and arm.against_cfg:
            scores |= self._once(f"cfg-{self._path(name, seed).stem}", settings, against_cfg)
        return scores

    def arm_recipe(self, arm: Arm, seed: int) -> Recipe:
        """toy-flux as the arm changes it, in its own folder. The cache is shared unless the autoencoder differs."""
        folder = self.out / f"seed-{seed}{arm.suffix}"
        common = [*self.overrides, f"seed={seed}", f"output={folder}"]
        if arm.ae_ratio is None:
            common += [f"defaults.cache={self.out}/cache"]
        else:
            common += [f"defaults.autoencoder={self.student(arm.ae_ratio)}"]
            common += [f"defaults.cache={self.out}/ae-{arm.ae_ratio:g}/cache"]
        return load_recipe(self.name, [*common, *arm.changes])

    def student(self, ae_ratio: float | None) -> str:
        """Folder of the new autoencoder."""
        plain: str = self.recipe.stages["cache"].autoencoder
        return plain if ae_ratio is None else f"{self.out}/ae-{ae_ratio:g}/ae-align/model"

    def pipeline(self, name: str, seed: int) -> Pipeline:
        """The arm's model, trained if it is not there yet."""
        arm = ARMS[name]
        recipe = self.arm_recipe(arm, seed)
        if arm.ae_ratio is not None:
            self._align_autoencoder(arm.ae_ratio)
        for stage in arm.stages:
            run_recipe(recipe, only=stage)
        student = self.student(arm.ae_ratio)
        if not arm.stages:
            adapter = recipe.folder / "untrained.safetensors"
            save_adapter(adapter, untrained(self.recipe, seed))
            return self._pipeline(adapter=adapter, autoencoder=student)
        result = recipe.folder / arm.stages[-1]
        if (result / "release").is_dir():
            return Pipeline(result / "release", text_tokens=self.recipe.stages["cache"].text_tokens)
        return self._pipeline(adapter=result / "adapter.safetensors", autoencoder=student)

    def _pipeline(self, **how: Any) -> Pipeline:
        """The base, as it is or moved, reading captions at the length that the recipe trains with."""
        return Pipeline(self.base, text_tokens=self.recipe.stages["cache"].text_tokens, **how)

    def _align_autoencoder(self, ratio: float) -> None:
        """The DC-AE with an alignment term, and the cache of its latents."""
        cache = self.recipe.stages["cache"]
        pictures = cache.data.model_dump(mode="json")
        stages = {
            "ae-align": {
                "autoencoder": self.student(None), "teacher": f"{self.base}/vae", "data": pictures, "ratio": ratio,
                "steps": AE_STEPS, "batch": AE_BATCH, "optimizer": {"lr": 1.0e-4, "clip": 1.0},
            },
            "cache": {**cache.model_dump(mode="json"), "autoencoder": "ae-align/model"},
        }  # fmt: skip
        run_recipe(parse_recipe({"name": "toy-ae", "output": f"{self.out}/ae-{ratio:g}", "stages": stages}))

    @torch.no_grad()
    def cfg_gap(self, model: Pipeline, reference: Pipeline) -> float:
        """How far the one-pass velocity at g = 3.5 is from true CFG: 0 = equal, 1 = as far as no guidance at all.

        sum |v(x,c,g) - v_cfg|^2 / sum |v_raw - v_cfg|^2 with v_cfg by arXiv:2509.25180 Eq. 4 from the reference's raw
        velocities, over pictures no training saw, at every sigma that the sampler visits.
        """
        off = total = 0.0
        space = model.autoencoder.space
        sigmas = model.schedule.sigmas(STEPS, tokens=model.tokens(SIZE, SIZE), channels=space.channels)
        nothing = reference.text([""])
        for start in range(0, len(self.pairs), 64):
            pairs = self.pairs[start : start + 64]
            images = torch.stack([self.judge.pictures.draw(pair, FIRST_UNSEEN) for pair in pairs])
            latents = space.normalize(model.autoencoder.encode(images))
            noise = seeded_noise(range(start, start + len(pairs)), latents.shape[1:])
            cond = model.text(self.judge.captions(pairs))
            empty = {name: value.expand(len(pairs), *value.shape[1:]) for name, value in nothing.items()}
            one = torch.ones(len(pairs))
            for sigma in sigmas[:-1]:
                now = sigma.expand(len(pairs))
                noised = guidance.interpolate(latents, noise, now)
                raw = reference.velocity(noised, now, cond, one)
                true = guidance.cfg_velocity(raw, reference.velocity(noised, now, empty, one), GUIDANCE - 1)
                found = model.velocity(noised, now, cond, GUIDANCE * one)
                off += (found - true).square().sum().item()
                total += (raw - true).square().sum().item()
        return off / total

    def results(self) -> dict[str, Any]:
        """Everything scored so far in this folder, whatever call did it."""
        rows: dict[str, list[dict[str, float]]] = {name: [row] for name, row in self.references().items()}
        seeds: dict[str, list[int]] = {}
        for name, arm in ARMS.items():
            done = sorted((self.out / "scores").glob(f"{name}-seed-*.json"), key=_seed_of)
            if done:
                rows[arm.title] = [_scores(path) for path in done]
                seeds[arm.title] = [_seed_of(path) for path in done]
        return {
            "captions": len(self.pairs),
            "guidance": GUIDANCE,
            "steps": STEPS,
            "stages": {name: stage.model_dump(mode="json") for name, stage in self.recipe.stages.items()},
            "arms": {arm.title: arm.about for arm in ARMS.values()},
            "seeds": seeds,
            "rows": rows,
            "summary": {name: summary(scores) for name, scores in rows.items()},
            "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        }

    def strips(self) -> dict[str, Path]:
        """Sample pictures of each arm's first seed."""
        found = {arm.title: sorted((self.out / "scores").glob(f"{name}-seed-*.png")) for name, arm in ARMS.items()}
        return {title: paths[0] for title, paths in found.items() if paths}

    def _samples(self, images: Tensor) -> Tensor:
        """Eight pictures of different subjects and colours."""
        step = max(1, len(images) // 8)
        return images[[(k * step + k) % len(images) for k in range(8)]]

    def _path(self, name: str, seed: int) -> Path:
        return self.out / "scores" / f"{name}-seed-{seed}.json"

    def _setting(self, parts: list[Any]) -> str:
        return digest_json([parts, self.captions, GUIDANCE, STEPS])

    def _once(self, stem: str, settings: str, make: Any) -> Any:
        """The scores in scores/STEM.json; made now, and written whole, if they are not there."""
        path = self.out / "scores" / f"{stem}.json"
        if path.is_file():
            found = read_json(path)
            if found["settings"] != settings:
                raise SystemExit(f"{path} was measured with other settings; remove it, or use another --out")
            return found["scores"]
        begin = time.perf_counter()
        scores = make()
        write_json(path, {"settings": settings, "scores": scores, "seconds": round(time.perf_counter() - begin, 1)})
        return scores


def untrained(recipe: Recipe, seed: int) -> Adapter:
    """The base with an embedder and a head as they are initialised."""
    base = recipe.stages["cache"].base
    family, release = read_base(base)
    space = autoencoder_space(recipe.stages["cache"].autoencoder)
    _, ends = fresh_ends(family, release.config, space.channels, 1, seed)
    return Adapter(
        backbone=release.backbone.name,
        tensors={f"{path}.{name}": tensor for path, end in ends.items() for name, tensor in end.state_dict().items()},
        lora={},
        latent=space,
        base=release.signature,
        schedule=recipe.stages["head"].schedule,
        base_weights=open_model(base).identity(),
        base_latent=release.latent,
    )


def draw(pipeline: Pipeline, judge: Judge, pairs: Sequence[Pair], seed: int, two_passes: bool = False) -> Tensor:
    """One picture (3,H,W) in -1..1 for each caption at g = 3.5, in batches of 32.

    two_passes: by true CFG (Eq. 4), as ever for a model without guidance embedding.
    """
    two_passes = two_passes or not pipeline.distilled
    how = {"guidance": 1.0, "cfg_w": GUIDANCE - 1} if two_passes else {"guidance": GUIDANCE}
    images = []
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        noise = [100_000 * (seed + 1) + start + k for k in range(len(part))]
        images.append(pipeline.images(judge.captions(part), noise, SIZE, SIZE, steps=STEPS, **how))
    return torch.cat(images)


def _through(autoencoder: Any, images: Tensor) -> Tensor:
    return torch.cat([autoencoder.decode(autoencoder.encode(part)) for part in images.split(32)])


def _scores(path: Path) -> dict[str, float]:
    """All that was measured of an arm and seed."""
    more = path.with_name(f"cfg-{path.name}")
    return {**read_json(path)["scores"], **(read_json(more)["scores"] if more.is_file() else {})}


def _seed_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def summary(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and spread (sample standard deviation) of every column that was measured."""
    return {
        column: {
            "mean": round(mean(row[column] for row in scores), 4),
            "spread": round(stdev(row[column] for row in scores), 4) if len(scores) > 1 else 0.0,
        }
        for column in COLUMNS
        if all(column in row for row in scores)
    }


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """The rows as a Markdown table, mean ± spread over the seeds."""
    lines = ["| | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, scores in rows.items():
        found = summary(scores)
        cells = [_cell(found[column], len(scores)) if column in found else "" for column in COLUMNS]
        lines.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(part: dict[str, float], seeds: int) -> str:
    return f"{part['mean']:.3f}" + (f" ± {part['spread']:.3f}" if seeds > 1 else "")


def figure(rows: dict[str, list[dict[str, float]]], strips: dict[str, Path], path: Path) -> None:
    """Bars of what was measured beside sample pictures, one line an arm, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = [title for title in rows if title in strips]
    found = {title: summary(rows[title]) for title in titles}
    columns = ("frechet", "both", "frechet_cfg", "cfg_gap")
    height = 0.62 * len(titles) + 0.7
    drawn, axes = plt.subplots(1, 5, figsize=(14, height), width_ratios=(1, 1, 1, 1, 2.6), layout="constrained")
    places = range(len(titles))
    for axis, column in zip(axes, columns, strict=False):
        has = [k for k in places if column in found[titles[k]]]
        parts = [found[titles[k]][column] for k in has]
        axis.barh(has, [p["mean"] for p in parts], xerr=[p["spread"] for p in parts], color="#5b8fb9", ecolor="#333")
        axis.set(title=COLUMNS[column], yticks=places, ylim=(len(titles) - 0.5, -0.5))
        axis.set_yticklabels(titles if axis is axes[0] else [])
        if column == "frechet":
            axis.set_xscale("log")
    for place, title in enumerate(titles):
        axes[4].imshow(plt.imread(strips[title]), extent=(0, 8, place + 0.48, place - 0.48), aspect="auto")
    axes[4].set(xlim=(0, 8), ylim=(len(titles) - 0.5, -0.5), title="first seed's pictures")
    axes[4].axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=90)
    plt.close(drawn)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--recipe", choices=["toy-flux", "toy-sana"], default="toy-flux")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--arms", nargs="*", choices=list(ARMS), metavar="ARM", help=f"default {', '.join(MAIN)}; of {', '.join(ARMS)}"
    )
    parser.add_argument("--out", type=Path, help="default runs/toy-benchmark, runs/toy-sana-benchmark")
    parser.add_argument("--evaluator", type=Path, default=Path("toy/evaluator"))
    parser.add_argument("--every", type=int, default=1, help="draw every n-th caption only")
    parser.add_argument("--figure", type=Path, help="write a PNG of table and samples there")
    return parser


if __name__ == "__main__":
    main()

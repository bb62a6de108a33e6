"""Stage few-steps on the toy: `python -m benchmarks.few_steps [--out runs/few-steps]`.

Over the shipped DC-Gen toy, for each seed: the LoRA of recipe toy-flux-4step, and the distance of what 4 steps give
with it and without to what 20 steps give, at the captions and noise that no training saw, relative to the latter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import load_file

from dcgen.adapter import load_adapter
from dcgen.convert import merge_file
from dcgen.release import open_model
from train.config import load_recipe
from train.generate import Pipeline
from train.release import write_release
from train.run import run_recipe
from train.stages.few_steps import LORA
from train.toy.pictures import ToyPictures

TOY = Path("toy")
FEW, MANY, GUIDANCE, SIZE = 4, 20, 3.5, 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps; default the recipe's")
    options = parser.parse_args(arguments)
    release = merged_release(options.out)
    ratios = []
    for seed in options.seeds:
        overrides = [f"output={options.out / f'seed-{seed}'}", f"seed={seed}", f"base={release}"]
        overrides += [f"autoencoder={release}/vae", *([f"few-steps.steps={options.steps}"] if options.steps else [])]
        run_recipe(load_recipe("toy-flux-4step", overrides))
        plain, trained = distances(release, options.out / f"seed-{seed}" / "few-steps" / LORA, seed)
        ratios.append(trained / plain)
        print(f"seed {seed}: {FEW} Euler steps {plain:.4f}, with the LoRA {trained:.4f}, ratio {ratios[-1]:.3f}")
    spread = f" +- {stdev(ratios):.3f}" if len(ratios) > 1 else ""
    print(f"ratio {mean(ratios):.3f}{spread} over {len(ratios)} seeds")


def merged_release(out: Path) -> Path:
    """The shipped base and adapter as one release."""
    release, adapter = out / "release", load_adapter(TOY / "adapter" / "toy-flux-dcgen.safetensors")
    if not release.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        merged = merge_file(open_model(TOY / "flux-base"), adapter, out / "merged.safetensors")
        write_release(release, merged, TOY / "flux-base", TOY / "dc-ae-f32", adapter)
    return release


@torch.no_grad()
def distances(release: Path, lora: Path, seed: int) -> tuple[float, float]:
    """Relative distance to 20 steps of 4 steps without and with the LoRA, over the pairs that were never trained."""
    pipeline = Pipeline(release)
    pictures = ToyPictures(TOY / "data")
    captions = [pictures.caption(pair) for pair in pictures.pairs("held_out")]
    seeds = [1_000_000 * (seed + 1) + number for number in range(len(captions))]

    def latents(steps: int) -> torch.Tensor:
        return pipeline.latents(captions, seeds, SIZE, SIZE, steps=steps, guidance=GUIDANCE)

    many, few = latents(MANY), latents(FEW)
    add_lora(pipeline.model, lora)
    trained = latents(FEW)
    return float((few - many).norm() / many.norm()), float((trained - many).norm() / many.norm())


def add_lora(model: torch.nn.Module, file: Path) -> None:
    """Merge a LoRA file into a network of its names."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for path in {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}:
        a, b, alpha = (tensors[f"{path}.{name}"] for name in ("lora_A.weight", "lora_B.weight", "alpha"))
        weight = model.get_parameter(f"{path}.weight")
        product = b.flatten(1) @ a.flatten(1)  # 1x1 convolutions, too
        weight.data += (float(alpha) / len(a)) * product.reshape(weight.shape).to(weight.dtype)


if __name__ == "__main__":
    main()

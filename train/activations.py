"""Largest inputs of a model's layers, by which SVDQuant smooths: python -m train.activations RELEASE -o OUT.

Samples an image for each prompt and writes, for each Linear in the blocks, the largest magnitude of each input (K,) by
diffusers path. `python -m dcgen.quantize ... --activations OUT` reads it.
"""
# N tokens, K inputs of a layer

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from train.files import write_tensors
from train.generate import Pipeline


@contextmanager
def largest_inputs(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within this context the mapping collects the largest magnitude of each input (K,) of these Linear layers."""
    largest: dict[str, Tensor] = {}

    def watch(path: str) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found = arguments[0].detach().abs().flatten(0, -2).amax(dim=0).float()
            largest[path] = torch.maximum(largest[path], found) if path in largest else found

        return network.get_submodule(path).register_forward_pre_hook(hook)

    hooks = [watch(path) for path in paths]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def block_layers(pipeline: Pipeline) -> list[str]:
    """Paths of the Linear layers in the blocks of a pipeline's network."""
    backbone = pipeline.family.backbone
    blocks = tuple(f"{path}." for _, path, _ in backbone.stacks.values())
    modules = pipeline.model.named_modules()
    return [path for path, module in modules if isinstance(module, nn.Linear) and path.startswith(blocks)]


def collect(pipeline: Pipeline, prompts: Sequence[str], side: int, *, steps: int, guidance: float) -> dict[str, Tensor]:
    """The largest inputs while an image of side x side pixels is sampled for each prompt, seeds 0, 1, ..."""
    with largest_inputs(pipeline.model, block_layers(pipeline)) as largest:
        for seed, prompt in enumerate(prompts):
            pipeline.latents([prompt], [seed], side, side, steps=steps, guidance=guidance)
    return largest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 after printing an error line to stderr."""
    parser = argparse.ArgumentParser(prog="python -m train.activations", description=__doc__.partition("\n\n")[0])
    parser.add_argument("release", type=Path, help="release folder of the base or of a DC-Gen model")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .safetensors to write")
    parser.add_argument("--adapter", type=Path, help="DC-Gen adapter for the base; needs --autoencoder")
    parser.add_argument("--autoencoder", type=Path, help="folder of the adapter's autoencoder")
    parser.add_argument("--prompts", type=Path, required=True, help="text file with a prompt per line")
    parser.add_argument("--side", type=int, default=1024, help="of the images in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        prompts = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{options.prompts}: no prompt in it; write one per line")
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        how = {"adapter": options.adapter, "autoencoder": options.autoencoder, "device": options.device, "dtype": dtype}
        pipeline = Pipeline(options.release, **how)
        largest = collect(pipeline, prompts, options.side, steps=options.steps, guidance=options.guidance)
        write_tensors(options.out, {path: value.cpu() for path, value in largest.items()})
    except (ValueError, OSError) as error:
        print(f"train.activations: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(largest)} layers, {len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())

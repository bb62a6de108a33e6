"""Copy the runs' results into toy/, in bfloat16: `python -m train.toy.release models`, then `... adapter`; for SANA
`... sana-base`, then `... sana-adapter`; and `... evaluator`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from dcgen.adapter import load_adapter, save_adapter
from train.files import read_json, write_folder, write_json, write_tensors

VAE_NAME, DCAE_NAME = "toy-vae-f8", "toy-dc-ae-f32"
ADAPTERS = {"adapter": "toy-flux", "sana-adapter": "toy-sana"}  # recipe by part


def assemble(base: Path, dcae: Path, out: Path) -> None:
    """Write out/flux-base and out/dc-ae-f32, each whole or not at all."""

    def write_base(folder: Path) -> None:
        _copy(base, folder)
        _name(folder / "vae", VAE_NAME)

    def write_dcae(folder: Path) -> None:
        _copy(dcae, folder)
        _name(folder, DCAE_NAME)

    write_folder(out / "flux-base", write_base)
    write_folder(out / "dc-ae-f32", write_dcae)


def assemble_sana(base: Path, out: Path) -> None:
    """Write out/sana-base. Its autoencoder is flux-base's: of that only the config is here, and the index says none."""

    def write(folder: Path) -> None:
        _copy(base, folder)
        shutil.rmtree(folder / "vae")
        (folder / "vae").mkdir()
        shutil.copyfile(out / "flux-base" / "vae" / "config.json", folder / "vae" / "config.json")
        index = read_json(folder / "model_index.json")
        write_json(folder / "model_index.json", {**index, "vae": [None, None]})

    write_folder(out / "sana-base", write)


def ship_adapter(source: Path, out: Path) -> None:
    """Write out/adapter/NAME of the source: the LoRA in bfloat16, embedder and head as they are."""
    adapter = load_adapter(source)
    adapter.lora = {
        path: dataclasses.replace(pair, A=_half(pair.A), B=_half(pair.B)) for path, pair in adapter.lora.items()
    }
    (out / "adapter").mkdir(parents=True, exist_ok=True)
    save_adapter(out / "adapter" / source.name, adapter)


def _copy(source: Path, target: Path) -> None:
    """The same tree with floating-point tensors in bfloat16."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            tensors = {name: _half(tensor) for name, tensor in load_file(path).items()}
            write_tensors(place, tensors, {"format": "pt"})
        else:
            shutil.copyfile(path, place)


def _name(autoencoder: Path, name: str) -> None:
    """Say in an autoencoder's config what its latent space is called."""
    config = read_json(autoencoder / "config.json")
    write_json(autoencoder / "config.json", {**config, "_name_or_path": name})


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["models", "adapter", "sana-base", "sana-adapter", "evaluator"])
    parser.add_argument("--base", type=Path, default=Path("runs/toy-base/distill/release"), help="FLUX release folder")
    parser.add_argument("--dcae", type=Path, default=Path("runs/toy-dcae/refine/model"), help="DC-AE folder")
    parser.add_argument(
        "--sana", type=Path, default=Path("runs/toy-sana-base/pretrain/release"), help="SANA release folder"
    )
    parser.add_argument("--evaluator", type=Path, default=Path("runs/toy-evaluator/evaluator/model"))
    parser.add_argument("--adapter", type=Path, help="adapter file; default the recipe's export")
    parser.add_argument("--out", type=Path, default=Path("toy"))
    options = parser.parse_args()
    if options.part == "models":
        assemble(options.base, options.dcae, options.out)
    elif options.part == "sana-base":
        assemble_sana(options.sana, options.out)
    elif options.part == "evaluator":
        write_folder(options.out / "evaluator", lambda folder: _copy(options.evaluator, folder))
    else:
        recipe = ADAPTERS[options.part]
        ship_adapter(options.adapter or Path(f"runs/{recipe}/export/{recipe}-dcgen.safetensors"), options.out)


if __name__ == "__main__":
    main()

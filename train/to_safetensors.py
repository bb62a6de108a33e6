"""`python -m train.to_safetensors FOLDER ...`: rewrites a release's pickled weights as safetensors, beside them.

Some published releases, DiT's among them, have `.bin` files only, and nothing here loads a pickle.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dcgen.files import weight_files
from train.files import write_tensors


def rewrite(folder: Path) -> list[Path]:
    """Rewrite each `.bin` in a release's parts whose part has no safetensors; returns the new files.

    Only tensors are unpickled (torch.load with weights_only). ValueError for a file that holds anything else, and for a
    folder without weights.
    """
    written = []
    files = sorted(path for path in folder.glob("*/*.bin") if not weight_files(path.parent))
    if not files and not any(weight_files(part) for part in folder.glob("*") if part.is_dir()):
        raise ValueError(f"{folder} has no part with weights (PART/*.bin or PART/*.safetensors); download the release")
    for file in files:
        out = file.with_suffix(".safetensors")
        written.append(write_tensors(out, _tensors(file), {"format": "pt"}))
    return written


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{file} is not a file of tensors ({error}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds other things than tensors by name; only those can be rewritten")
    return {name: value.clone() for name, value in state.items()}  # tied weights share memory, which is refused


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.to_safetensors", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="a release folder in the diffusers layout")
    try:
        for folder in parser.parse_args(arguments).folder:
            for path in rewrite(folder):
                print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Quantizes a model for ComfyUI: python -m dcgen.quantize MODEL --format int8 -o OUT.safetensors.

MODEL is a DC-Gen model or a base: a release folder, a transformer folder, or a file. With --adapter the adapter is
merged into it first. --dequantize reverses it: a quantized MODEL with its weights expanded, to look at or to measure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..adapter import Adapter, check_name, load_adapter, save_adapter
from ..convert import SPLIT, pack
from ..files import Entry
from ..merge import merged_model, split
from ..release import Model
from ..spaces import SPACES
from ..tensors import Tensors, total_bytes
from .formats import FORMATS
from .gguf_file import GGUF_FORMATS, check_shape, write_gguf
from .nunchaku_file import check_nunchaku, is_nunchaku, open_nunchaku, write_nunchaku
from .plan import counted, plan
from .read import open_quantized
from .svdquant import DEFAULT_RANK, SVDQUANT_FORMATS, SvdQuant
from .write import open_source, quantize_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dcgen.quantize", description=__doc__.partition("\n\n")[2])
    parser.add_argument("model", type=Path, help="release folder, transformer folder or file; not quantized")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--dequantize", action="store_true", help="write a quantized model in bfloat16")
    task.add_argument(
        "--format", choices=[*FORMATS, *GGUF_FORMATS, *SVDQUANT_FORMATS], help="of the layers in the blocks"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file to write: .safetensors, or .gguf")
    parser.add_argument("--adapter", type=Path, help="DC-Gen adapter that is merged into the model first")
    parser.add_argument("--split", type=Path, metavar="ENDS", help=SPLIT)
    parser.add_argument("--strength", type=float, default=1.0, help="of the adapter's LoRA (default: %(default)s)")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="layers of blocks that stay as they are, e.g. 'transformer_blocks.0.*'; can be repeated",
    )
    parser.add_argument(
        "--rank", type=int, default=DEFAULT_RANK, help="of SVDQuant's 16-bit branch (default: %(default)s)"
    )
    parser.add_argument(
        "--activations",
        type=Path,
        help="largest inputs of the layers, by which SVDQuant smooths (docs/quantization.md)",
    )
    parser.add_argument("--device", default="cpu", help="where weights are quantized, e.g. cuda (default: %(default)s)")
    parser.add_argument("--latent", choices=SPACES, help="autoencoder, when the files do not name it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a config field, as in dcgen.convert"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and its size")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 after printing an error line to stderr."""
    args = _parser().parse_args(arguments)
    try:
        print(_run(args))
    except (ValueError, OSError) as error:
        print(f"dcgen.quantize: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> str:
    if args.dequantize:
        opened = open_nunchaku(args.model) if is_nunchaku(args.model) else open_quantized(args.model)
        return str(pack(opened, args.out, dtype=torch.bfloat16))
    model, ends = _source(args)
    summary = _svdquant(args, model) if args.format in SVDQUANT_FORMATS else _by_layer(args, model)
    if ends is not None and not args.dry_run:
        save_adapter(args.split, ends)
    return f"{args.out}: {summary}"


def _by_layer(args: argparse.Namespace, model: Model) -> str:
    """Write a file of ComfyUI's formats or a GGUF file, and say what is in it."""
    fmt = {**FORMATS, **GGUF_FORMATS}[args.format]
    if args.format in GGUF_FORMATS:
        check_shape(model)
    units = plan(model, fmt, args.keep)
    if not args.dry_run and args.format in GGUF_FORMATS:
        write_gguf(model, args.out, fmt, keep=args.keep, progress=_progress)
    elif not args.dry_run:
        quantize_model(model, args.out, fmt, keep=args.keep, device=args.device, progress=_progress)
    numbers = ", ".join(f"{number} layers {core}" for core, number in counted(units).items())
    return f"{numbers}; {_gigabytes(entry for unit in units for entry in unit.written)}"


def _svdquant(args: argparse.Namespace, model: Model) -> str:
    """Write a file for nunchaku, and say what is in it."""
    if args.keep:
        raise ValueError("--keep: nunchaku has no layers in its blocks that are not quantized")
    fmt = SvdQuant(args.format == SVDQUANT_FORMATS[1], args.rank)
    layers = check_nunchaku(model, fmt)
    if not args.dry_run:
        file = Tensors.open(args.activations) if args.activations else None
        activations = {name: file.get(name) for name in file.entries} if file else None
        write_nunchaku(model, args.out, fmt, activations=activations, device=args.device, progress=_progress)
    size = _gigabytes(entry for packed in layers for entry in packed.entries(fmt))
    return f"{len(layers)} layers {fmt.name}, rank {fmt.rank}; {size} in blocks"


def _gigabytes(entries: Iterable[Entry]) -> str:
    return f"{total_bytes(entries) / 1e9:.3f} GB"


def _source(args: argparse.Namespace) -> tuple[Model, Adapter | None]:
    """What is quantized, and the adapter of --split."""
    model = open_source(args.model, args.latent, args.set)
    if args.split and not args.adapter:
        raise ValueError(
            "--split needs the base as MODEL, and --adapter: a merged model lacks the base's embedder and head. "
            "python -m dcgen.convert extract makes an adapter of a merged model and its base"
        )
    if args.split:
        check_name(args.split)
    if not args.adapter:
        return model, None
    merged = merged_model(model, load_adapter(args.adapter), args.strength)
    return split(merged) if args.split else (merged, None)


def _progress(step: int, steps: int, name: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{step + 1}/{steps} {name:<70.70}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

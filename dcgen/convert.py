"""Converts model files, tensor by tensor: python -m dcgen.convert COMMAND --help.

pack     release folder, transformer folder or .pth -> one .safetensors with all metadata
unpack   one file -> release folder with diffusers names, sharded
merge    base + DC-Gen adapter -> one .safetensors
extract  merged model - base -> DC-Gen adapter
preview  DC-AE -> the same DC-AE with preview factors, which pack copies into model files
info     print what a file or folder is
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, check_name, load_adapter, save_adapter
from .dcae import load_dcae, save_dcae
from .extract import FactoredLayer, extract
from .files import SUFFIXES, Entry, naming, opened, replacing_folder, write_stream
from .folder import TRANSFORMER, note_schedule
from .jsons import parse_json
from .latent import LatentSpace
from .merge import MergedModel, merged_model, split
from .preview import fit_preview
from .release import Model, model_metadata, open_model
from .schedule import Schedule
from .spaces import SPACES
from .tensors import INDEX_SUFFIX, total_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("original", "diffusers")
FORMER_NAMES = {"native": "original"}  # --names of earlier versions
SPLIT = (
    "write only the blocks to the file, with the base's own embedder and head, for loaders that know the base but not "
    "DC-Gen; and those of DC-Gen to this adapter, for Apply DC-Gen"
)
SHARD_BYTES = 5_000_000_000
WEIGHTS = "diffusion_pytorch_model"


def pack(
    model: Model, out: str | os.PathLike[str], *, names: str = "original", dtype: torch.dtype | None = None
) -> Path:
    """Write the model as one .safetensors with its config, latent space, previews and schedule in the metadata.

    names: "original" (which ComfyUI uses) or "diffusers". dtype: of floating-point tensors, None = unchanged.
    """
    return _write(model, Path(out), names, dtype)


def merge_file(
    base: Model,
    adapter: Adapter,
    out: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    names: str = "original",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write base + adapter as one .safetensors, as pack() does. ValueError when the adapter is for another base."""
    return pack(merged_model(base, adapter, strength), out, names=names, dtype=dtype)


def unpack(
    model: Model,
    out: str | os.PathLike[str],
    *,
    parts: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the model as OUT/transformer in the diffusers layout, sharded; `parts` is a release from which the other
    parts (autoencoder, text encoders, scheduler, model_index.json) are copied. OUT must not exist.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not, or remove it")
    with replacing_folder(out) as temporary:
        if parts is not None:
            top = str(parts)
            shutil.copytree(
                parts,
                temporary,
                ignore=lambda folder, _: [TRANSFORMER] if folder == top else [],
                dirs_exist_ok=True,
            )
            note_schedule(temporary, model.schedule)
        folder = temporary / TRANSFORMER
        folder.mkdir(parents=True)
        _write_shards(model, folder, dtype, shard_bytes, model_metadata(model, out.name))
        config = {"_class_name": model.backbone.diffusers_class, **model.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


def describe(path: str | os.PathLike[str]) -> str:
    """A description of an adapter, a model file or a release folder, in several lines."""
    path = Path(path)
    if path.suffix in SUFFIXES and path.is_file():
        with opened(path) as file:
            adapter = "dcgen.format" in (file.metadata() or {})
        if adapter:
            return _describe_adapter(load_adapter(path))
    model = open_model(path)
    lines = [
        f"{model.backbone.name} ({model.backbone.diffusers_class}), {total_bytes(model.entries.values()) / 1e9:.2f} GB",
        *(f"  {key}: {value}" for key, value in sorted(model.config.items())),
    ]
    return "\n".join([*lines, _describe_latent(model.latent), f"schedule: {_describe_schedule(model.schedule)}"])


def _write(model: Model, out: Path, names: str, dtype: torch.dtype | None) -> Path:
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the result is a .safetensors file; give it that ending")
    names = FORMER_NAMES.get(names, names)
    if names not in NAMES:
        raise ValueError(f"names must be one of {', '.join(NAMES)}, got {names!r}")
    with naming(model.tensors.path):
        entries, get = model.entries, model.get
        if names == "diffusers":
            announced = [_cast_entry(entry, dtype) for entry in entries.values()]
            stream: Iterable[tuple[str, Tensor]] = ((entry.name, get(entry.name)) for entry in announced)
        else:
            joined, extras = list(model.original_entries(entries)), model.extras
            announced = [_cast_entry(entry, dtype) for entry in (*(entry for _, entry in joined), *extras.values())]
            stream = chain(
                ((rule.original, rule.join(get)) for rule, _ in joined), ((key, model.get_extra(key)) for key in extras)
            )
        write_stream(out, announced, _cast(stream, dtype), model_metadata(model, out.stem))
    return out


def _write_shards(
    model: Model, folder: Path, dtype: torch.dtype | None, shard_bytes: int, metadata: dict[str, str]
) -> None:
    shards: list[list[Entry]] = [[]]
    for entry in (_cast_entry(entry, dtype) for entry in model.entries.values()):
        if shards[-1] and total_bytes(shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        numbered = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{WEIGHTS}{numbered}.safetensors"
        stream = ((entry.name, model.get(entry.name)) for entry in shard)
        write_stream(folder / name, shard, _cast(stream, dtype), {**metadata, "format": "pt"})
        weight_map |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        size = sum(total_bytes(shard) for shard in shards)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{WEIGHTS}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cast_entry(entry: Entry, dtype: torch.dtype | None) -> Entry:
    return replace(entry, dtype=dtype) if dtype is not None and entry.dtype.is_floating_point else entry


def _cast(stream: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _describe_adapter(adapter: Adapter) -> str:
    ranks = sorted({pair.rank for pair in adapter.lora.values()})
    return "\n".join(
        [
            f"DC-Gen adapter for {adapter.backbone}, patch size {adapter.patch_size}",
            *(f"  base {key}: {value}" for key, value in sorted(adapter.base.items())),
            f"  LoRA on {len(adapter.lora)} layers, rank {ranks[0]} to {ranks[-1]}" if ranks else "  no LoRA",
            _describe_latent(adapter.latent),
            f"schedule: {adapter.schedule}",
        ]
    )


def _describe_latent(latent: LatentSpace | None) -> str:
    if latent is None:
        return "latent: unknown"
    preview = "with" if latent.rgb_factors else "no"
    return (
        f"latent: {latent.name or 'unnamed'}, {latent.channels} channels, f{latent.spatial_factor}, "
        f"scaling {latent.scaling_factor:g}, shift {latent.shift_factor:g}, {preview} preview factors"
    )


def _describe_schedule(schedule: Schedule | None) -> str:
    return "unknown" if schedule is None else str(schedule.to_dict())


def _summary(layers: list[FactoredLayer]) -> str:
    lines = [f"{layer.energy:9.6f}  rank {layer.rank:4d}  {layer.path}" for layer in layers]
    if not layers:
        return "no Linear changed: the adapter is an embedder and a head"
    worst = min(layers, key=lambda layer: layer.energy)
    return "\n".join([*lines, f"energy kept over {len(layers)} layers: worst {worst.energy:.6f} ({worst.path})"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dcgen.convert", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, *arguments: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        for argument in arguments:
            subparser.add_argument(argument, type=Path)
        return subparser

    packing = command("pack", "release folder or .pth -> one .safetensors with metadata", "model", "out")
    merging = command("merge", "base + DC-Gen adapter -> one .safetensors", "base", "adapter", "out")
    unpacking = command("unpack", "one file -> folder with diffusers names, sharded", "model", "out")
    extracting = command("extract", "merged model - base -> DC-Gen adapter", "merged", "base", "out")
    command("preview", "DC-AE -> one .safetensors with preview factors for live previews", "autoencoder", "out")
    command("info", "print what a file or folder is", "model")
    for subparser in (packing, merging):
        subparser.add_argument(
            "--names",
            type=lambda name: FORMER_NAMES.get(name, name),
            choices=NAMES,
            default=NAMES[0],
            help="key names (default: %(default)s, which ComfyUI uses)",
        )
    merging.add_argument("--split", type=Path, metavar="ENDS", help=SPLIT)
    merging.add_argument("--strength", type=float, default=1.0, help="of the LoRA; 0 = alignment only")
    unpacking.add_argument("--parts", type=Path, help="release folder to copy the other parts from")
    extracting.add_argument("--rank", type=int, default=256, help="largest rank of a layer (default: %(default)s)")
    extracting.add_argument("--energy", type=float, default=1.0, help="share of each change to keep, in (0,1]")
    extracting.add_argument("--device", default="cpu", help="where the SVD runs, e.g. cuda")
    for subparser in (packing, merging, unpacking, extracting):
        subparser.add_argument("--dtype", choices=DTYPES, help="of the result (default: unchanged)")
    for subparser in (packing, unpacking, extracting):
        subparser.add_argument("--latent", choices=SPACES, help="autoencoder, when the files do not name it")
        subparser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="a config field that no tensor shows, e.g. interpolation_scale=2.0 and sample_size=128 for SANA 4K",
        )
    return parser


def open_as(path: Path, latent: str | None = None, fields: Sequence[str] = ()) -> Model:
    """The model at `path` on the latent space of this name, with config fields as in `--set FIELD=VALUE`."""
    model = open_model(path)
    if fields:
        config = {**model.config, **_fields(fields, model)}
        model = replace(model, config=config)
        model.check()
    if latent is None:
        return model
    space = SPACES[latent]
    if model.latent is not None and (differences := space.differences(model.latent)):
        raise ValueError(f"{path} disagrees with --latent {latent}: {'; '.join(differences)}. Leave --latent out")
    return model.on_latent(space)


def _fields(arguments: Sequence[str], model: Model) -> dict[str, Any]:
    values = {}
    for entry in arguments:
        field, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, got {entry!r}")
        if field not in model.config:
            raise ValueError(
                f"a {model.backbone.name} config has no field {field!r}: {', '.join(sorted(model.config))}"
            )
        try:
            values[field] = parse_json(value, f"--set {entry}")
        except ValueError as error:
            raise ValueError(f"{error}: the value must be JSON (a number, true, null or a quoted word)") from error
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 after printing an error line to stderr."""
    args = _parser().parse_args(arguments)
    dtype = DTYPES.get(getattr(args, "dtype", None) or "")
    try:
        if args.command == "pack":
            print(pack(open_as(args.model, args.latent, args.set), args.out, names=args.names, dtype=dtype))
        elif args.command == "merge":
            merged = merged_model(open_as(args.base), load_adapter(args.adapter), args.strength)
            print(_merge(merged, args.out, args.split, args.names, dtype))
        elif args.command == "unpack":
            print(unpack(open_as(args.model, args.latent, args.set), args.out, parts=args.parts, dtype=dtype))
        elif args.command == "extract":
            print(_extract(args, dtype))
        elif args.command == "preview":
            print(_preview(args.autoencoder, args.out))
        else:
            print(describe(args.model))
    except (ValueError, OSError) as error:
        print(f"dcgen.convert: {error}", file=sys.stderr)
        return 1
    return 0


def _merge(merged: MergedModel, out: Path, ends: Path | None, names: str, dtype: torch.dtype | None) -> Path:
    if ends is None:
        return pack(merged, out, names=names, dtype=dtype)
    check_name(ends)
    blocks, adapter = split(merged)
    pack(blocks, out, names=names, dtype=dtype)
    save_adapter(ends, adapter)
    return out


def _extract(args: argparse.Namespace, dtype: torch.dtype | None) -> str:
    def progress(step: int, steps: int, key: str) -> None:
        print(f"\r{step + 1}/{steps} {key:<70.70}", end="", file=sys.stderr, flush=True)

    merged, base = open_as(args.merged, args.latent, args.set), open_as(args.base)
    options = {"rank": args.rank, "energy": args.energy, "dtype": dtype, "device": args.device}
    adapter, layers = extract(merged, base, progress=progress, **options)
    print(file=sys.stderr)
    save_adapter(args.out, adapter)
    return f"{_summary(layers)}\n{args.out}"


def _preview(path: Path, out: Path) -> str:
    model = load_dcae(path)
    with torch.no_grad():
        space, explained = fit_preview(model.encode, model.latent_space)
    model.rgb_factors, model.rgb_bias = space.rgb_factors, space.rgb_bias
    return f"preview factors explain {explained:.1%} of the colours\n{save_dcae(model, out)}"


if __name__ == "__main__":
    sys.exit(main())

"""What quantization costs: `python -m benchmarks.quantize [--models flux sana blocks] [--formats int8 w4a8 ...]`.

The toy's DC-Gen models are merged and quantized by dcgen.quantize in every format, read back, and compared with the
unquantized model: size, error of the velocity, difference of the images, whether the images still show their prompts.
`blocks` does the same for random blocks of the published widths, whose inputs have outlier channels. The inputs of a
quantized layer are rounded as a GPU does that multiplies in the format; the column "weights" leaves them as they are.
"""
# B batch, N tokens, K inputs of a layer

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen import guidance
from dcgen.adapter import load_adapter
from dcgen.merge import merged_model, split
from dcgen.quantize import floating, integer, packing
from dcgen.quantize.formats import FORMATS, Format
from dcgen.quantize.nunchaku_file import Packed, open_nunchaku, packed_layers, write_nunchaku
from dcgen.quantize.plan import WEIGHT, plan
from dcgen.quantize.read import open_quantized
from dcgen.quantize.svdquant import SHIFT, SvdQuant
from dcgen.quantize.write import quantize_model, quantized
from dcgen.release import Model, open_model
from dcgen.tensors import Tensors
from train.activations import block_layers, largest_inputs
from train.evaluate.judge import FIRST_UNSEEN, Judge
from train.generate import Pipeline
from train.sample import seeded_noise
from train.toy.pictures import SIZE

ROOT = Path(__file__).resolve().parents[1]
AUTOENCODER = ROOT / "toy" / "dc-ae-f32"
CAPTIONS, STEPS, GUIDANCE = 48, 20, 3.5
SIGMAS = (0.2, 0.5, 0.8, 0.97)
# True CFG for the model without a guidance embedding; layers that do not fit a format; positions of text.
TOYS: dict[str, dict[str, Any]] = {
    "flux": {"cfg_w": 0.0, "keep": {}, "text": None},
    "sana": {"cfg_w": 1.5, "keep": {"w6a8": ["*.conv_point"], "mxfp8": ["*.conv_point"]}, "text": 16},
}
OUTLIERS, OUTLIER_SIZE = 0.01, 20.0


def _rotated_rows(x: Tensor) -> Tensor:
    parts = integer.quantize_rows(integer.rotated(x))
    return integer.rotated(parts["weight"].float() * parts["weight_scale"])


def _nvfp4(x: Tensor) -> Tensor:
    scale = floating.tensor_scale(x, floating.E4M3_MAX * floating.E2M1_MAX)
    return floating.dequantize_nv(*floating.quantize_nv(x, scale), scale)


# What ComfyUI does to the inputs (N,K) of a layer in a format where the hardware multiplies in it.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": _rotated_rows,
    "w6a8": _rotated_rows,
    "w4a8": _rotated_rows,
    "fp8": lambda x: floating.to_e4m3(x).float(),  # without a calibrated scale ComfyUI takes 1
    "mxfp8": lambda x: floating.dequantize_mx(*floating.quantize_mx(x)),
    "nvfp4": _nvfp4,
}


def rounded(fmt: Format) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A forward pre-hook that rounds the inputs of a Linear, or of a 1x1 convolution, as `fmt` does."""

    def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else arguments[0]
        found = INPUTS[fmt.name](x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return (found.movedim(-1, 1) if isinstance(layer, nn.Conv2d) else found,)

    return hook


@contextmanager
def rounded_inputs(network: nn.Module, formats: dict[str, Format]) -> Iterator[None]:
    """Within this context the inputs of these layers are rounded as their formats do."""
    hooks = [network.get_submodule(layer).register_forward_pre_hook(rounded(fmt)) for layer, fmt in formats.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Toy:
    """The toy's DC-Gen model of a family, and what it is compared on."""

    def __init__(self, family: str, captions: int):
        self.settings = TOYS[family]
        base, adapter = ROOT / "toy" / f"{family}-base", ROOT / "toy" / "adapter" / f"toy-{family}-dcgen.safetensors"
        self.model = merged_model(open_model(base), load_adapter(adapter))
        where = {"adapter": adapter, "autoencoder": AUTOENCODER, "text_tokens": self.settings["text"]}
        self.pipeline = Pipeline(base, **where)
        self.judge = Judge(ROOT / "toy" / "evaluator", ROOT / "toy" / "data")
        every = self.judge.pictures.pairs("all")
        self.pairs = every[:: max(1, len(every) // captions)][:captions]
        self.load(self.model)
        self.wanted = self.velocities(), self.images()

    def load(self, model: Model | Replaced) -> None:
        """Take over the weights of a model."""
        network = self.pipeline.model
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        network.load_state_dict({key: model.get(key).float().reshape(shape) for key, shape in shapes.items()})

    @torch.no_grad()
    def velocities(self) -> Tensor:
        """At several noise levels of unseen images."""
        pipeline = self.pipeline
        space = pipeline.autoencoder.space
        images = torch.stack([self.judge.pictures.draw(pair, FIRST_UNSEEN) for pair in self.pairs])
        latents = space.normalize(pipeline.autoencoder.encode(images))
        noise, cond = seeded_noise(range(len(latents)), latents.shape[1:]), pipeline.text(self.captions)
        scale = torch.full((len(latents),), GUIDANCE) if pipeline.distilled else None
        times = [torch.full((len(latents),), sigma) for sigma in SIGMAS]
        noised = [guidance.interpolate(latents, noise, time) for time in times]
        return torch.stack([pipeline.velocity(x, time, cond, scale) for x, time in zip(noised, times, strict=True)])

    def images(self) -> Tensor:
        how = {"steps": STEPS, "guidance": GUIDANCE, "cfg_w": self.settings["cfg_w"]}
        return self.pipeline.images(self.captions, range(len(self.pairs)), SIZE, SIZE, **how)

    @property
    def captions(self) -> list[str]:
        return self.judge.captions(self.pairs)

    def row(self, fmt: Format, folder: Path) -> list[str]:
        """A line of the table."""
        keep = self.settings["keep"].get(fmt.name, ())
        start = time.perf_counter()
        file = quantize_model(self.model, folder / f"{fmt.name}.safetensors", fmt, keep=keep)
        seconds = time.perf_counter() - start
        self.load(open_quantized(file))
        weights = relative(self.velocities(), self.wanted[0])
        with rounded_inputs(self.pipeline.model, self._layers(fmt, keep)):
            both, images = relative(self.velocities(), self.wanted[0]), self.images()
        errors = [f"{weights:.3f}", f"{both:.3f}", f"{psnr(images, self.wanted[1]):.1f}"]
        return [fmt.name, f"{file.stat().st_size / 1e6:.2f}", *errors, f"{self.shown(images):.3f}", f"{seconds:.1f}"]

    def reference(self) -> list[str]:
        size = sum(entry.nbytes for entry in self.model.entries.values())
        return ["bf16", f"{size / 1e6:.2f}", "0", "0", "", f"{self.shown(self.wanted[1]):.3f}", ""]

    def shown(self, images: Tensor) -> float:
        return self.judge.score(images, self.pairs).both

    def _layers(self, fmt: Format, keep: Sequence[str]) -> dict[str, Format]:
        """The layers whose inputs are rounded, by diffusers path."""
        units = [unit for unit in plan(self.model, fmt, keep) if unit.stored and not unit.stored.exact]
        return {part.removesuffix(WEIGHT): unit.stored.format for unit in units if unit.stored for part in unit.parts}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Of all images together, in dB; both (B,3,H,W) in -1..1."""
    error = (found.clamp(-1, 1) - wanted.clamp(-1, 1)).square().mean()
    return float(10 * torch.log10(4 / error))


# SVDQuant ---------------------------------------------------------------------------------------------------------


def svdquant_inputs(fmt: SvdQuant, x: Tensor, smooth: Tensor, shifted: bool) -> Tensor:
    """Inputs (...,K) rounded as nunchaku's kernels do: divided by `smooth`, per group, where they are shifted without a
    sign.
    """
    shift = SHIFT if shifted and not fmt.fp4 else 0.0
    groups = ((x + shift) / smooth).unflatten(-1, (-1, fmt.group))
    if fmt.fp4:
        scale = floating.to_e4m3(groups.abs().amax(-1, keepdim=True) / floating.E2M1_MAX).float()
        scale = torch.where(scale == 0, 1.0, scale)
        codes = floating.e2m1_codes(groups / scale)
        table = torch.tensor([*floating.E2M1, *(-value for value in floating.E2M1)])
        return (table[codes.int()] * scale).flatten(-2) * smooth
    most, least = (15, 0) if shifted else (7, -7)
    scale = (groups.abs().amax(-1, keepdim=True) / most).clamp(min=1e-8)
    return ((groups / scale).round().clamp(least, most) * scale).flatten(-2) * smooth - shift


class Branched:
    """A Linear as nunchaku computes it: the branch of the inputs as they are, the residual of the rounded ones."""

    def __init__(self, fmt: SvdQuant, file: Tensors, pieces: Sequence[Packed], part: str, bias: Tensor):
        self.fmt, self.bias, self.pieces = fmt, bias, []
        for packed in pieces:
            names = [entry.name.rpartition(".")[2] for entry in packed.entries(fmt)]
            stored = {name: file.get(f"{packed.name}.{name}") for name in names}
            weight = fmt.dequantize(stored, packed.shape)
            up, down = packing.unpacked_up(stored["lora_up"]), packing.unpacked_down(stored["lora_down"])
            branch = (up.float() @ down.float())[: packed.shape[0], : packed.shape[1]]
            smooth = packing.unpacked_vector(stored["smooth"]).float()[: packed.shape[1]]
            first = sum(rows for rows, _ in packed.shapes[: packed.parts.index(part)])
            rows = slice(first, first + packed.shapes[packed.parts.index(part)][0])
            residual = (weight - branch)[rows]
            self.pieces.append((packed.columns, packed.layer.shifted, smooth, residual, branch[rows]))

    def __call__(self, x: Tensor) -> Tensor:
        out = self.bias
        for columns, shifted, smooth, residual, branch in self.pieces:
            own = x[..., columns]
            out = out + F.linear(svdquant_inputs(self.fmt, own, smooth, shifted), residual) + F.linear(own, branch)
        return out


def svdquant_row(toy: Toy, fmt: SvdQuant, folder: Path, activations: dict[str, Tensor] | None) -> list[str]:
    """A line of the table. activations: for smoothing, from captions that are not compared."""
    blocks, ends = split(toy.model)
    start = time.perf_counter()
    path = write_nunchaku(blocks, folder / f"{fmt.name}.safetensors", fmt, activations=activations)
    seconds = time.perf_counter() - start
    back, file, network = open_nunchaku(path), Tensors.open(path), toy.pipeline.model
    toy.load(Replaced(back, ends.tensors))
    weights = relative(toy.velocities(), toy.wanted[0])
    layers: dict[str, list[Packed]] = {}
    for packed in packed_layers(toy.model.backbone, toy.model.signature):
        for part in () if packed.layer.splits else packed.parts:
            layers.setdefault(part, []).append(packed)
    for part, pieces in layers.items():
        module: Any = network.get_submodule(part)
        module.forward = Branched(fmt, file, pieces, part, module.bias.detach())
    both, images = relative(toy.velocities(), toy.wanted[0]), toy.images()
    for part in layers:
        del network.get_submodule(part).forward
    name = f"{fmt.name} r{fmt.rank}{' smoothed' if activations else ''}"
    errors = [f"{weights:.3f}", f"{both:.3f}", f"{psnr(images, toy.wanted[1]):.1f}"]
    return [name, f"{path.stat().st_size / 1e6:.2f}", *errors, f"{toy.shown(images):.3f}", f"{seconds:.1f}"]


class Replaced:
    """A model with other tensors for some names, for Toy.load."""

    def __init__(self, model: Model, tensors: dict[str, Tensor]):
        self.model, self.tensors = model, tensors

    def get(self, key: str) -> Tensor:
        return self.tensors[key] if key in self.tensors else self.model.get(key)


def svdquant_rows(toy: Toy, folder: Path) -> Iterator[list[str]]:
    """Lines of the table; the toy's widths allow a rank of 32, which is a larger share of them than of FLUX's."""
    toy.load(toy.model)
    with largest_inputs(toy.pipeline.model, block_layers(toy.pipeline)) as activations:
        pairs = toy.judge.pictures.pairs("all")[1::16]
        captions, seeds = toy.judge.captions(pairs), range(1000, 1000 + len(pairs))
        toy.pipeline.latents(captions, seeds, SIZE, SIZE, steps=STEPS, guidance=GUIDANCE)
    for fp4 in (True, False):
        for rank, smooth in ((16, None), (32, None), (32, dict(activations))):
            yield svdquant_row(toy, SvdQuant(fp4, rank), folder, smooth)


# Blocks of the published widths -----------------------------------------------------------------------------------


WIDTHS = {"FLUX (3072, 12288)": (3072, 12288), "SANA 1.6B (2240, 5600)": (2240, 5600)}


@torch.no_grad()
def block_errors(fmt: Format) -> list[str]:
    """The error of a random feed-forward at each width, its weights and inputs in `fmt`, with outlier channels."""
    errors = []
    for width, hidden in WIDTHS.values():
        torch.manual_seed(0)
        layers = nn.Linear(width, hidden), nn.Linear(hidden, width)
        block = nn.Sequential(nn.LayerNorm(width), layers[0], nn.GELU("tanh"), layers[1])
        x = torch.randn(256, width) * torch.where(torch.rand(width) < OUTLIERS, OUTLIER_SIZE, 1.0)
        wanted = block(x)
        try:
            for layer in layers:
                shape = (layer.out_features, layer.in_features)
                fmt.check(shape)
                layer.weight.copy_(fmt.dequantize(quantized(fmt, layer.weight), shape))
        except ValueError:
            errors.append("")
            continue
        with rounded_inputs(block, {"1": fmt, "3": fmt}):
            errors.append(f"{relative(block(x), wanted):.3f}")
    return errors


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


HEAD = ["format", "MB", "velocity: weights", "and inputs", "PSNR, dB", "both right", "seconds"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--models", nargs="+", choices=[*TOYS, "blocks"], default=[*TOYS, "blocks"])
    parser.add_argument("--svdquant", action=argparse.BooleanOptionalAction, default=True, help="rows for nunchaku")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    formats = [FORMATS[name] for name in options.formats]
    for name in options.models:
        print(f"\n{name}\n")
        if name == "blocks":
            print(table(["format", *WIDTHS], [[fmt.name, *block_errors(fmt)] for fmt in formats]), flush=True)
            continue
        toy = Toy(name, options.captions)
        with tempfile.TemporaryDirectory() as folder:
            rows = [toy.reference(), *(toy.row(fmt, Path(folder)) for fmt in formats)]
            if options.svdquant and toy.model.backbone.nunchaku:
                rows += svdquant_rows(toy, Path(folder))
            print(table(HEAD, rows), flush=True)


if __name__ == "__main__":
    main()

"""What a run will cost, worked out from configs alone: tokens, parameters, memory per rank, disk. For --dry-run."""
# B batch per rank and micro-batch, N tokens (image and text), D width, L blocks, r rank

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcgen.backbones import Backbone
from dcgen.folder import TRANSFORMER, VAE, autoencoder_space
from dcgen.latent import LatentSpace
from dcgen.spaces import SPACES
from train.autoencoders import same_autoencoder
from train.config import nearest
from train.cost import forward_work, hours_line, sample_flops
from train.disk import checkpoint_bytes, size_text
from train.families import ARCHITECTURES, FAMILIES
from train.family import Family
from train.models import read_base
from train.stages.base import Context

# Bytes kept for backward in one block, in units of B*N*D values: inputs and outputs of norms, q, k, v, attention,
# both MLP sides. Counted over a block with a stream for text; within a factor of 1.3 for other blocks.
ACTIVATIONS = 34
SLACK = 1.15  # allocator and temporary buffers
EIGHT_BIT = 2 * (1 + 4 / 256)  # bytes of both moments a value: a byte, and a scale for each block of 256


@dataclass(frozen=True)
class Geometry:
    """Base and new model at one image size."""

    family: Family
    config: dict[str, Any]
    source: LatentSpace
    target: LatentSpace
    source_patch: int
    target_patch: int
    text_tokens: int

    @property
    def backbone(self) -> Backbone:
        return self.family.backbone

    def tokens(self, pixels: int) -> tuple[int, int]:
        """Image tokens of the base and of the new model."""
        old = self.backbone.tokens(pixels, pixels, self.source.spatial_factor, self.source_patch)
        return old, self.backbone.tokens(pixels, pixels, self.target.spatial_factor, self.target_patch)

    @property
    def moved(self) -> dict[str, Any]:
        return self.backbone.config_with_latent(self.config, self.target.channels, self.target_patch)


def geometry(context: Context, base: str, autoencoder: str, architecture: str, patch_size: int) -> Geometry | str:
    """The geometry of a stage, from its folders or, where absent, from a published architecture; else why not."""
    folder, student = context.resolve(base), context.resolve(autoencoder)
    owner, published = ARCHITECTURES.get(architecture, (None, None))
    if architecture and published is None:
        return f"architecture {architecture!r} is unknown{nearest(architecture, ARCHITECTURES)}"
    text = published.text[0] if published else 0
    if (folder / TRANSFORMER / "config.json").is_file():
        family, release = read_base(folder)
        config, source, source_patch = release.config, release.latent, release.patch_size
    elif owner is not None and published is not None:
        family, config = owner, published.config
        source, source_patch = SPACES[published.latent], published.patch_size
    else:
        return f"{folder} is not there yet; name `architecture` to plan without it"
    target = _student_space(student, published.latent if published and student == folder / VAE else "")
    if target is None:
        return f"{student} is not there and its name is no published autoencoder{nearest(student.name, SPACES)}"
    return Geometry(family, config, source, target, source_patch, patch_size, text)


def _student_space(folder: Path, fallback: str) -> LatentSpace | None:
    if (folder / "config.json").is_file():
        return autoencoder_space(folder)
    name = folder.name.removesuffix("-diffusers")
    return SPACES.get(name) or SPACES.get(fallback)


@lru_cache(maxsize=16)
def _meta(family: str, items: tuple[tuple[str, Any], ...]) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[family].network_class().from_config(dict(items))


def network(family: Family, config: dict[str, Any]) -> nn.Module:
    """The network without memory (meta device)."""
    items = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return _meta(family.backbone.name, tuple(sorted(items.items())))


@dataclass(frozen=True)
class Counts:
    """Parameters: all, embedder and head, LoRA; number of blocks; width."""

    total: int
    ends: int
    lora: int
    blocks: int
    width: int
    linear: int  # in the linear layers of blocks


def count(geo: Geometry, rank: int) -> Counts:
    """Parameter counts of the moved model, exact."""
    model: Any = network(geo.family, geo.moved)
    ends = geo.backbone.ends(geo.moved)
    trained = sum(p.numel() for path in ends.trained for p in model.get_submodule(path).parameters())
    lora = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and geo.family.is_lora_target(name):
            lora += rank * (weight.shape[0] + weight[0].numel())
    total = sum(p.numel() for p in model.parameters())
    width = model.get_submodule(ends.embedder).weight.shape[0]
    blocks = geo.family.blocks(model)
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    return Counts(total, trained, lora, len(blocks), width, sum(layer.weight.numel() for layer in layers))


@dataclass(frozen=True)
class Load:
    """What one rank holds in a training stage."""

    weights: int  # values in the frozen network
    trained: int  # values trained
    tokens: int  # image and text
    rows: int  # samples in one micro-batch of one rank
    blocks: int
    width: int
    frozen_bytes: int  # per value
    ema: bool
    checkpointing: bool
    passes: int  # forward passes whose activations are kept (Eq. 7 with both gradients: 2)
    shards: int
    linear: int = 0  # values in the linear layers of blocks, which train.frozen can store otherwise
    int8: bool = False
    offloaded: int = 0  # blocks whose linear layers are in RAM
    ram_activations: bool = False
    moments: float = 8  # bytes of AdamW's two, per value

    def gigabytes(self) -> dict[str, float]:
        """Memory of one rank in GB by use; an estimate."""
        state = 4 + 4 + self.moments + (4 if self.ema else 0)  # weight, gradient, moments, EMA
        one, between = self._activations()
        return {
            "frozen weights": self._frozen() / 1e9,
            "trained, gradients, AdamW, EMA": state * self.trained / self.shards / 1e9,
            "activations": (one if self.ram_activations else one + between) / 1e9,
        }

    def in_ram(self) -> float:
        """GB that one rank moves to RAM: frozen weights of blocks, and what recomputation starts from."""
        weights = self._linear_bytes() * self.offloaded / self.blocks
        return (weights + (self._activations()[1] if self.ram_activations else 0)) / 1e9

    def _linear_bytes(self) -> float:
        return (1 if self.int8 else self.frozen_bytes) * self.linear

    def _frozen(self) -> float:
        """Bytes of frozen weights on the device. What train.frozen stores is not divided among ranks."""
        other = self.frozen_bytes * (self.weights - self.linear) / self.shards
        if not (self.int8 or self.offloaded):
            return other + self._linear_bytes() / self.shards
        on_the_way = 2 if self.offloaded else 0  # blocks: the one at work and the one that is fetched
        return other + self._linear_bytes() * min(1.0, (self.blocks - self.offloaded + on_the_way) / self.blocks)

    def _activations(self) -> tuple[float, float]:
        """Bytes within blocks, and of the inputs of blocks that recomputation starts from."""
        kept = SLACK * self.rows * self.tokens * self.width * self.passes * (self.frozen_bytes / 2)
        if not self.checkpointing:
            return ACTIVATIONS * kept * self.blocks, 0.0
        return ACTIVATIONS * kept, 2 * kept * self.blocks

    def total(self) -> float:
        """GB of one rank."""
        return sum(self.gigabytes().values())


def remedy(load: Load, limit: float, changes: list[tuple[str, Load]]) -> str | None:
    """None when a load fits in `limit` GB; else the first change (or all before it together) that would make it fit."""
    if load.total() <= limit:
        return None
    need = f"needs about {load.total():.0f} GB a rank, memory_gb is {limit:g}"
    for words, other in changes:
        if other.total() <= limit:
            return f"{need}; set {words} (about {other.total():.0f} GB)"
    return f"{need}; no setting here makes it fit: use more ranks with shard: 0, a smaller image or a smaller rank"


def plan_cache(context: Context, config: Any) -> list[str]:
    """Lines on a cache stage: images, captions, disk."""
    geo = geometry(context, config.base, config.autoencoder, config.architecture, 1)
    if isinstance(geo, str):
        return [geo]
    pixels, images = pixels_of(config.data), images_of(context, config.data)
    width = 4 if config.store == "float32" else 2
    folder = context.resolve(config.teacher) if config.teacher else context.resolve(config.base) / VAE
    one = same_autoencoder(folder, context.resolve(config.autoencoder))
    spaces = [geo.source] if one else [geo.source, geo.target]
    values = sum(s.channels * (pixels // s.spatial_factor) ** 2 for s in spaces)
    lines = [f"teacher {_space(geo.source)}, student {_space(geo.target)}, {pixels}x{pixels} px"]
    if images is None:
        return [*lines, f"{values * width / 1e3:.1f} kB of latents an image; data is not there yet"]
    lines.append(f"{images} images; latents {size_text(values * width * images)}")
    _, published = ARCHITECTURES.get(config.architecture, (None, None))
    if published and published.text[0] and config.text == "cache":
        tokens = config.text_tokens or published.text[0]
        lines.append(
            f"text embeddings up to {size_text(tokens * published.text[1] * width * images)} (text: online needs none)"
        )
    return lines


def plan_align(context: Context, config: Any) -> list[str]:
    """Lines on an align stage: grid, solver, what trains."""
    cache = context.recipe.stages.get(config.cache)
    if cache is None:
        return [f"cache {config.cache} is not a stage of this recipe"]
    geo = geometry(context, config.base, cache.autoencoder, config.architecture, config.patch_size)
    if isinstance(geo, str):
        return [geo]
    counts, (old, new) = count(geo, 1), geo.tokens(pixels_of(cache.data))
    features = geo.target.channels * config.patch_size**2
    solver = (
        f"one pass, {features + 1}x{features + 1} normal equations in float64"
        if config.solver == "closed-form"
        else (f"{config.steps} AdamW steps of {config.batch}")
    )
    return [f"Eq. 1, {config.resample}: {old} -> {new} tokens, {solver}; trains {(features + 1) * counts.width} values"]


def plan_moved(context: Context, config: Any, rank: int, full: bool = False) -> tuple[list[str], list[str]]:
    """Lines and problems of a head or finetune stage."""
    cache = context.recipe.stages.get(config.cache)
    if cache is None:
        return [f"cache {config.cache} is not a stage of this recipe; nothing to plan from"], []
    geo = geometry(context, config.base, cache.autoencoder, config.architecture, config.patch_size)
    if isinstance(geo, str):
        return [geo], []
    recipe, pixels = context.recipe, pixels_of(cache.data)
    counts, (old, new) = count(geo, rank), geo.tokens(pixels)
    text = cache.text_tokens or geo.text_tokens
    trained = counts.total if full else counts.ends + (counts.lora if rank else 0)
    load, changes = _loads(config, recipe.ranks, counts, trained, new + text)
    words = "the whole network" if full else "embedder, head" + (f" and LoRA r={rank}" if rank else "")
    lines = [
        f"{old} -> {new} tokens an image at {pixels} px, {text} of text; {counts.blocks} blocks {counts.width} wide",
        f"trains {words}: {trained:,} of {counts.total:,} parameters",
        f"{recipe.ranks} ranks: {load.total():.1f} GB a rank ("
        + ", ".join(f"{name} {size:.1f}" for name, size in load.gigabytes().items())
        + f"), {load.rows} samples a micro-batch"
        + (f", {load.in_ram():.1f} GB in RAM" if load.in_ram() else ""),
        f"checkpoint {size_text(checkpoint_bytes(trained, config.ema is not None))}, {config.keep_checkpoints} kept",
    ]
    images = images_of(context, cache.data)
    if images is not None:
        lines.append(f"{-(-images // config.batch)} steps an epoch, {config.steps * config.batch / images:.1f} epochs")
    lines.append(hours_line(stage_flops(geo, config, rank, full, (new, text)), load.total()))
    problem = remedy(load, recipe.memory_gb, changes) if recipe.memory_gb else None
    return lines, [problem] if problem else []


def load_of(context: Context, config: Any, rank: int, full: bool = False) -> Load:
    """What one rank of a head or finetune stage holds; ValueError where its geometry is not known."""
    cache = context.recipe.stages[config.cache]
    geo = geometry(context, config.base, cache.autoencoder, config.architecture, config.patch_size)
    if isinstance(geo, str):
        raise ValueError(geo)
    counts, (_, new) = count(geo, rank), geo.tokens(pixels_of(cache.data))
    trained = counts.total if full else counts.ends + (counts.lora if rank else 0)
    return _loads(config, context.recipe.ranks, counts, trained, new + (cache.text_tokens or geo.text_tokens))[0]


def stage_flops(geo: Geometry, config: Any, rank: int, full: bool, tokens: tuple[int, int]) -> float:
    """FLOPs of all steps of a head or finetune stage at (image, text) tokens, without autoencoder and text encoders."""
    work = forward_work(geo.family, network(geo.family, geo.moved), geo.moved, tokens, rank)
    embedded = geo.config.get("guidance_embeds", False)
    guided = config.objective.loss == "guided" and (embedded or config.objective.implicit_w)
    return (
        config.steps
        * config.batch
        * sample_flops(
            work,
            full=full,
            checkpointing=config.gradient_checkpointing,
            uncond=1 - config.objective.caption_dropout if guided else 0.0,
            uncond_grad=config.objective.uncond_grad,
        )
    )


def _loads(config: Any, ranks: int, counts: Counts, trained: int, tokens: int) -> tuple[Load, list[tuple[str, Load]]]:
    """The load as configured, and the changes to try, cheapest first and each on top of those before."""
    distilled = config.objective.loss == "guided"
    shards = ranks if config.shard == 0 else config.shard
    fields = {
        "weights": counts.total,
        "trained": trained,
        "tokens": tokens,
        "rows": max(1, config.batch // (ranks * config.accumulate)),
        "blocks": counts.blocks,
        "width": counts.width,
        "frozen_bytes": 2 if config.dtype == "bfloat16" else 4,
        "ema": config.ema is not None,
        "checkpointing": config.gradient_checkpointing,
        "passes": 2 if distilled and config.objective.uncond_grad else 1,
        "shards": shards,
        "linear": counts.linear,
        "int8": config.frozen_store == "int8",
        "offloaded": min(config.offload_blocks, counts.blocks),
        "ram_activations": config.offload_activations,
        "moments": EIGHT_BIT if config.optimizer.state == "8bit" else 8,
    }
    changes: list[tuple[str, Load]] = []
    words: list[str] = []
    rows, share = fields["rows"], config.batch // ranks
    settings: list[tuple[str, dict[str, Any]]] = [
        ("dtype: bfloat16", {"frozen_bytes": 2}),
        ("gradient_checkpointing: true", {"checkpointing": True}),
        (f"accumulate: {share}", {"rows": 1}),
        ("shard: 0", {"shards": ranks}),
        *([("optimizer.state: 8bit", {"moments": EIGHT_BIT})] if ranks == 1 else []),
        *([("frozen_store: int8", {"int8": True})] if trained < counts.total else []),
        *([(f"offload_blocks: {counts.blocks}", {"offloaded": counts.blocks})] if trained < counts.total else []),
    ]
    for setting, change in settings:
        if all((fields | {"rows": rows})[key] == value for key, value in change.items()):
            continue
        fields_after = {**(changes[-1][1].__dict__ if changes else fields), **change}
        words.append(setting)
        changes.append((", ".join(words), Load(**fields_after)))
    return Load(**fields), changes


def pixels_of(data: Any) -> int:
    """Side of the square with the area of a training image."""
    return getattr(data, "pixels", 128)


def images_of(context: Context, data: Any) -> int | None:
    """How many images there are, or are planned; None when nobody can know yet."""
    planned = getattr(data, "planned", None)
    if planned:
        return planned
    from train.data import open_source

    try:
        return len(open_source(data, context.resolve(data.path)))
    except (OSError, ValueError):
        return None


def _space(space: LatentSpace) -> str:
    return f"{space.name} f{space.spatial_factor}c{space.channels}"

"""What is wrong or missing, said before anything is drawn, and what would be done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from dcgen.adapter import check_model, load_adapter
from dcgen.folder import VAE, autoencoder_space
from dcgen.release import open_model
from train.autoencoders import check_autoencoder
from train.conditioning import of_samples
from train.evaluate.draw import list_images
from train.evaluate.images import read_folder
from train.evaluate.measured import Metric
from train.evaluate.metrics import chosen_metrics
from train.evaluate.prompts import Prompt
from train.evaluate.spec import SEED_STEP, Evaluation
from train.models import read_base


def problems_of(evaluation: Evaluation, metrics: Mapping[str, Metric]) -> list[str]:
    """A line for each thing that is missing or does not fit: prompts, models, metrics' files and packages."""
    found: list[str] = []
    prompts: list[Prompt] = []
    found += complaints("prompts", lambda: prompts.extend(evaluation.prompts.read()))
    if len(evaluation.seeds) > 1 and len(prompts) > SEED_STEP:
        found.append(f"{len(prompts)} prompts with several seeds: beyond {SEED_STEP} their noise would be the same")
    for name, model in evaluation.models.items():
        where = f"models.{name}"
        missing = [
            f"{where}.{field} {getattr(model, field)} is no folder"
            for field in ("base", "autoencoder", "images")
            if getattr(model, field) and not Path(getattr(model, field)).is_dir()
        ]
        if model.adapter and not Path(model.adapter).is_file():
            missing.append(f"{where}.adapter {model.adapter} is no file")
        if not missing and model.images:
            missing = complaints(f"{where}.images", read_folder, Path(model.images), prompts)
        elif not missing:
            missing = complaints(where, check_fit, evaluation, name)
        found += missing
    return found + [line for metric in metrics.values() for line in metric.check()]


def complaints(where: str, check: Callable[..., object], *given: object) -> list[str]:
    """The problem that `check(*given)` raises, with `where` before it; empty when there is none."""
    try:
        check(*given)
    except (ValueError, OSError) as error:
        return [f"{where}: {error}"]
    return []


def check_fit(evaluation: Evaluation, name: str) -> None:
    """ValueError where base, adapter, autoencoder, size and sampler of a model do not fit each other."""
    model, sampling = evaluation.models[name], evaluation.sampling_of(name)
    base = Path(model.base)
    family, _ = read_base(base)
    if names := of_samples(family.fields):
        raise ValueError(f"{family.backbone.title} also takes {', '.join(names)}, which prompts do not say")
    if sampling.sampler == "ddpm" and not family.denoises:
        raise ValueError(f"sampler ddpm is for models trained by DDPM, {family.backbone.title} was not")
    autoencoder = Path(model.autoencoder) if model.autoencoder else base / VAE
    check_autoencoder(autoencoder)
    space = autoencoder_space(autoencoder)
    space.latent_size(sampling.height, sampling.width)
    if model.adapter:
        adapter = load_adapter(model.adapter)
        check_model(adapter, open_model(base))
        adapter.check_latent(space, str(autoencoder))


def plan(evaluation: Evaluation, only: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """(what would be done, what is missing), a line each."""
    metrics = chosen_metrics(evaluation.metrics, only)
    problems = problems_of(evaluation, metrics)
    lines = [f"{evaluation.name}: {evaluation.about}", f"  output {evaluation.folder}"]
    prompts = [] if complaints("", evaluation.prompts.read) else evaluation.prompts.read()
    count = len(prompts) * len(evaluation.seeds)
    lines.append(f"  {len(prompts)} prompts ({evaluation.prompts.kind}), seeds {', '.join(map(str, evaluation.seeds))}")
    for name, model in evaluation.models.items():
        folder = evaluation.folder / name / "images"
        if model.images:
            lines.append(f"  {name}: images of {model.images}")
            continue
        there = sum(image.path.is_file() for image in list_images(evaluation, folder, prompts))
        s = evaluation.sampling_of(name)
        how = f"{s.steps} steps ({s.sampler}) at g = {s.guidance:g}, {s.height}x{s.width}"
        lines.append(f"  {name}: {how}; {there} of {count} images are drawn")
    lines.append(f"  metrics: {', '.join(metrics) or 'none'}; {evaluation.speed.images} images timed")
    return lines, problems

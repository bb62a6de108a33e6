"""An evaluation: models x prompts x seeds, and what is measured. YAML in train/evaluate/tables, as recipes are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from train.config import Name, RecipeError, Strict, nearest, parse_yaml, read_text, validate
from train.evaluate.prompts import PromptSet

TABLES = Path(__file__).parent / "tables"
SEED_STEP = 100_000  # between the noise of two seeds: image `index` of seed s starts from (s + 1) * SEED_STEP + index


class Sampling(Strict):
    """How images are drawn."""

    height: int = Field(1024, ge=16, le=1 << 14)
    width: int = Field(1024, ge=16, le=1 << 14)
    steps: int = Field(20, ge=1, le=10_000)
    guidance: float = Field(3.5, ge=0, description="g of the guidance embedding, or of true CFG where there is none")
    sampler: Literal["flow", "ddpm"] = Field("flow", description="ddpm: ancestral sampling of a class-conditional DDPM")
    guided_channels: int | None = Field(None, ge=1, description="ddpm: CFG in the first channels only; None = in all")


class Model(Strict):
    """A row of the table: a release, a release moved by an adapter, or a folder of images drawn elsewhere."""

    about: str = Field("", description="words for its row, such as its autoencoder")
    base: str = Field("", description="release folder")
    adapter: str = Field("", description="DC-Gen adapter; needs `autoencoder`")
    autoencoder: str = Field("", description="folder of the autoencoder, where the release does not bring it")
    strength: float = Field(1.0, ge=0, le=1, description="of the adapter's LoRA")
    text_tokens: int | None = Field(None, ge=1, le=1 << 14, description="length of the text; None = the release's own")
    images: str = Field("", description="folder of images instead of a model")
    sampling: dict[str, Any] = Field({}, description="fields that differ from the evaluation's `sampling`")

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if bool(self.base) == bool(self.images):
            raise ValueError("name either `base`, a release folder, or `images`, a folder of images drawn elsewhere")
        if self.adapter and not self.autoencoder:
            raise ValueError("`adapter` needs `autoencoder`, the folder of the new autoencoder")
        return self


class Speed(Strict):
    """What is timed of each model, after loading and warm-up, on the first rank's device."""

    images: int = Field(0, ge=0, le=10_000, description="images timed at batch 1; 0 = nothing is timed")
    warmup: int = Field(1, ge=0, le=100)
    batch: int = Field(1, ge=1, le=1 << 12, description="images at a time for the throughput")
    compile: bool = Field(False, description="torch.compile the network, as the paper did (section 4.1)")


class Fid(Strict):
    """Frechet Inception distance to a reference."""

    inception: str = Field(description="Inception weights: see train.evaluate.inception")
    reference: str = Field(description="ADM's .npz of statistics, or a folder of real images")
    batch: int = Field(32, ge=1, le=4096)


class InceptionScore(Strict):
    """Inception score."""

    inception: str
    splits: int = Field(10, ge=1, le=1000)
    batch: int = Field(32, ge=1, le=4096)


class ClipScore(Strict):
    """CLIP score: 100 times the cosine of image and text."""

    model: str = Field(description="folder of a CLIP model in transformers' layout")
    batch: int = Field(32, ge=1, le=4096)


class Aesthetic(Strict):
    """LAION's aesthetic predictor on CLIP embeddings."""

    model: str = Field(description="folder of CLIP ViT-L/14 in transformers' layout")
    head: str = Field(description="sac+logos+ava1-l14-linearMSE.pth")
    batch: int = Field(32, ge=1, le=4096)


class GenEval(Strict):
    """GenEval. The folder is always written; its scorer runs where `scorer` names it."""

    scorer: str = Field("", description="evaluation/evaluate_images.py of a GenEval checkout")
    python: str = Field("", description="interpreter of the environment with mmdet; default: this one")
    detector: str = Field("", description="folder of the detector's weights (--model-path)")


class JudgeOfToy(Strict):
    """The toy's judge."""

    evaluator: str = "toy/evaluator"
    data: str = "toy/data"


class Metrics(Strict):
    """What is measured; a metric that is not named is not."""

    clip: ClipScore | None = None
    aesthetic: Aesthetic | None = None
    fid: Fid | None = None
    inception_score: InceptionScore | None = None
    geneval: GenEval | None = None
    judge: JudgeOfToy | None = None


class Evaluation(Strict):
    """A table: what draws what from which prompts, and how it is measured."""

    name: Name
    about: str = ""
    output: str = Field("", description="default runs/evaluate/<name>")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    prompts: PromptSet = PromptSet()
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    batch: int = Field(1, ge=1, le=1 << 12, description="images drawn at a time")
    exact: bool = Field(False, description="keep images before rounding to 8 bits, too, for the toy's judge")
    sampling: Sampling = Sampling()
    models: dict[Name, Model] = Field(min_length=1)
    speed: Speed = Speed()
    metrics: Metrics = Metrics()
    resamples: int = Field(2000, ge=100, le=1_000_000, description="of the bootstrap")
    gallery: int = Field(24, ge=0, le=10_000, description="prompts shown in report.html")

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/evaluate/{self.name}").expanduser()

    def sampling_of(self, name: str) -> Sampling:
        """The sampling of a model: the evaluation's, with the model's own fields."""
        own = self.models[name].sampling
        return validate(Sampling, {**self.sampling.model_dump(), **own}, f"models.{name}.sampling")

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value) or not all(0 <= seed < 1 << 40 for seed in value):
            raise ValueError("seeds are different whole numbers from 0 on")
        return value


def load_evaluation(source: str, overrides: Sequence[str] = ()) -> Evaluation:
    """Read a table by name (train/evaluate/tables/NAME.yaml) or path, apply `a.b=value` overrides, validate all of it.

    An override that is empty (`metrics.fid=`) takes the section away. RecipeError names the field and what is valid.
    """
    path = find_table(source)
    raw = parse_yaml(read_text(path), str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a table is a mapping with `name` and `models`, found {type(raw).__name__}")
    for item in overrides:
        _override(raw, item)
    evaluation: Evaluation = validate(Evaluation, raw, str(path))
    for name in evaluation.models:
        evaluation.sampling_of(name)
    return evaluation


def find_table(source: str) -> Path:
    """Path of a table given by name or path."""
    named = TABLES / f"{source}.yaml"
    if named.is_file():
        return named
    if Path(source).is_file():
        return Path(source)
    raise RecipeError(f"no table {source!r}: neither a file nor a name{nearest(source, list_tables())}")


def list_tables() -> list[str]:
    """Names of the tables in train/evaluate/tables."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {item!r} is not key=value")
    if parts[0] not in Evaluation.model_fields:
        raise RecipeError(f"override {item!r}: {parts[0]!r} is no field{nearest(parts[0], Evaluation.model_fields)}")
    node = raw
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if text:
        node[parts[-1]] = parse_yaml(text, f"override {item!r}")
    else:
        node.pop(parts[-1], None)

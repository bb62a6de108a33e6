"""Recipes: YAML files checked by pydantic, every unknown name refused with the nearest valid one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from dcgen.fields import shown
from dcgen.schedule import Schedule
from train.stages import STAGES

RECIPES = Path(__file__).parent / "recipes"


# What becomes a folder or a file: one part of a path, and never one that leads elsewhere or hides itself.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=100)]
# {rule: ..., shift: ...} in a recipe; refused when it is read, not when a trained adapter is to be written.
ScheduleField = Annotated[Schedule, PlainValidator(Schedule.parse), PlainSerializer(Schedule.to_dict)]
NAME_RULE = "a name begins with a letter or digit and goes on with those, dots, dashes and underscores"
# A recipe is a page of text. What an alias unfolds to counts as often as it is used.
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1 << 20, 32, 100_000
# The largest value of a stage's whole numbers by field; far beyond what the paper ran, short of what no machine holds.
MAX_COUNT = 1 << 40
LIMITS = {
    "batch": 1 << 16,
    "accumulate": 1 << 16,
    "rank": 1 << 13,
    "patch_size": 64,
    "preview_steps": 10_000,
    "text_tokens": 1 << 14,
}


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names field, value and what would be valid."""


class Strict(BaseModel):
    """A config section: unknown fields are errors, values are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Optimizer(Strict):
    """AdamW. The defaults are the paper's Table 7 where it states a number."""

    lr: float = Field(1e-4, gt=0, description="learning rate (Table 7)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Table 7")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; 1e-3 in end-to-end fine-tuning (Table 7)")
    eps: float = Field(1e-8, gt=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up (Table 7: 2k in end-to-end, else 0)")
    decay: Literal["constant", "cosine"] = Field("constant", description="after warm-up; the paper states none")
    final_lr: float = Field(0.0, ge=0, le=1, description="fraction of lr reached at the end of a cosine decay")
    clip: float | None = Field(None, gt=0, description="gradient norm limit; None measures without clipping")


class StageConfig(Strict):
    """What every stage has. A stage's own Config inherits this and adds its fields."""

    kind: str
    steps: int = Field(0, ge=0, description="optimizer steps; 0 for stages that train nothing")
    batch: int = Field(1, ge=1, description="samples per optimizer step, over all ranks")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step")
    optimizer: Optimizer = Optimizer()
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the moving average of trained weights (0.999)")
    ema_warmup: int = Field(0, ge=0, description="decay grows as ema*(1-exp(-step/ema_warmup)); 0 = at once")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, ge=1, description="steps between rows in log.csv and TensorBoard")
    preview_every: int = Field(0, ge=0, description="steps between previews; 0 = none")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights and of activations")
    shard: int = Field(0, ge=0, description="ranks that share one copy (FSDP2); 0 = all of them, 1 = replicate (DDP)")

    later_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that are newer than runs which exist: at their default they are no part of settings()."""

    def settings(self, without: Iterable[str] = ()) -> dict[str, Any]:
        """The fields as JSON, for the records and digests of what a result was made with."""
        fields = type(self).model_fields
        unchanged = {name for name in self.later_fields if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude={*without, *unchanged})

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers that parse and cannot work are refused here, not by whoever runs out of memory over them."""
        limit = LIMITS.get(info.field_name or "", MAX_COUNT)
        if isinstance(value, int) and value > limit:
            raise ValueError(f"at most {limit}")
        return value


# Fields that may change between a run and its resumption without changing what is computed.
FREE_FIELDS = {
    "steps",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "preview_every",
    "preview_prompts",
    "preview_guidance",
    "preview_steps",
    "preview_seed",
    "shard",
    "accumulate",
    "architecture",
}


class Recipe(Strict):
    """A run: named stages in order. `defaults` holds values given to every stage that has such a field."""

    name: Name
    about: str = ""
    seed: int = Field(0, ge=0, lt=1 << 63)
    output: str = Field("", description="run folder; default runs/<name>")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: int = Field(1, ge=1, description="processes --dry-run plans for; the run takes what torchrun gives")
    memory_gb: float | None = Field(None, gt=0, description="of one rank's device; --dry-run refuses what needs more")
    defaults: dict[str, Any] = {}
    stages: dict[Name, Any] = Field(description="stage name -> its config, a subclass of StageConfig")

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}").expanduser()


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (train/recipes/NAME.yaml) or by path, apply `key=value` overrides, validate all of it.

    Raises RecipeError naming the field, the value and the nearest valid name.
    """
    path = find_recipe(source)
    raw = _yaml(_text(path), str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with `name` and `stages`, found {type(raw).__name__}")
    if not isinstance(raw.get("stages") or {}, dict):
        raise RecipeError(f"{path}: `stages` is a mapping of names to settings, found {type(raw['stages']).__name__}")
    for item in overrides:
        _override(raw, item)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data; each stage is parsed by its own Config class."""
    recipe = _validate(Recipe, raw, where)
    if not recipe.stages:
        raise RecipeError(f"{where}: `stages` is empty; name at least one stage")
    used: set[str] = set()
    stages: dict[str, StageConfig] = {}
    known: set[str] = set()
    for name, fields in recipe.stages.items():
        if not isinstance(fields or {}, dict):
            raise RecipeError(f"{where}: stages.{name} is a mapping of settings, found {shown(fields)}")
        fields = dict(fields or {})
        kind = fields.setdefault("kind", name)
        if not isinstance(kind, str):
            raise RecipeError(f"{where}: stages.{name}.kind is {shown(kind)}, expected the name of a kind")
        config = stage_class(kind, f"{where}: stages.{name}").Config
        known |= set(config.model_fields)
        shared = {key: value for key, value in recipe.defaults.items() if key in config.model_fields}
        used |= set(shared)
        stages[name] = _validate(config, {**shared, **fields}, f"{where}: stages.{name}")
    for key in recipe.defaults:
        if key not in used:
            raise RecipeError(f"{where}: defaults.{key} is a field of no stage here{nearest(key, known)}")
    return recipe.model_copy(update={"stages": stages})


def stage_class(kind: str, where: str = "recipe") -> Any:
    """The Stage subclass of a kind; an unknown kind is a RecipeError which lists the valid ones."""
    if not isinstance(kind, str) or kind not in STAGES:
        raise RecipeError(f"{where}: unknown kind {shown(kind)}{nearest(str(kind)[:100], STAGES)}")
    module, name = STAGES[kind].split(":")
    return getattr(importlib.import_module(module), name)


def find_recipe(source: str | Path) -> Path:
    """Path of a recipe given by name or path."""
    named = RECIPES / f"{source}.yaml"
    if named.is_file():
        return named
    if Path(source).is_file():
        return Path(source)
    raise RecipeError(
        f"no recipe {str(source)!r}: neither a file nor a name in train/recipes{nearest(str(source), list_recipes())}"
    )


def list_recipes() -> list[str]:
    """Names of the recipes shipped in train/recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def one_of(name: str, valid: Iterable[str]) -> str:
    """The name; ValueError with the nearest valid one where it is none."""
    valid = list(valid)
    if name not in valid:
        raise ValueError(f"unknown{nearest(name, valid)}")
    return name


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X? Valid: ...' for an error message."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} Valid: {', '.join(valid)}"


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: {path.stat().st_size} bytes, more than a recipe has ({MAX_BYTES})")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None


def _unshared(value: Any, where: str) -> Any:
    """The same data with every YAML alias (`*name`) a copy of its own, so that an override changes one place."""
    left = MAX_VALUES

    def copied(item: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            limit = f"{MAX_VALUES} values" if left < 0 else f"{MAX_DEPTH} levels"
            raise RecipeError(f"{where}: more than {limit}, counting what aliases stand for: this is no recipe")
        if isinstance(item, dict):
            return {key: copied(inner, depth + 1) for key, inner in item.items()}
        return [copied(inner, depth + 1) for inner in item] if isinstance(item, list) else item

    return copied(value, 0)


def _override(raw: dict[str, Any], item: str) -> None:
    """Apply `a.b.c=value` in place; the value is YAML. A first part that names a stage means that stage."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {item!r} is not key=value")
    parts = key.split(".")
    if parts[0] not in Recipe.model_fields and parts[0] in (raw.get("stages") or {}):
        parts = ["stages", *parts]
    if parts[0] not in Recipe.model_fields:
        valid = [*Recipe.model_fields, *(raw.get("stages") or {})]
        raise RecipeError(
            f"override {item!r}: {parts[0]!r} is neither a recipe field nor a stage{nearest(parts[0], valid)}"
        )
    if parts[0] == "stages" and len(parts) > 1 and parts[1] not in (raw.get("stages") or {}):
        raise RecipeError(f"override {item!r}: no stage {parts[1]!r}{nearest(parts[1], raw.get('stages') or {})}")
    node = raw
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[parts[-1]] = _yaml(text, f"override {item!r}") if text else ""


def _yaml(text: str, where: str) -> Any:
    try:
        return _unshared(yaml.safe_load(text), where)
    except RecursionError:
        raise RecipeError(f"{where}: not YAML of at most {MAX_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # PyYAML's own stumbles among them
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: not YAML ({error})") from None


def _validate(model: type[Strict], fields: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, item, where) for item in error.errors())) from None


def _explain(model: type[BaseModel], item: Any, where: str) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        hint = nearest(str(item["loc"][-1]), _fields_at(model, item["loc"][:-1]))
        return f"{where}: unknown field {location!r} (value {item['input']!r}){hint}"
    if item["type"] == "missing":
        return f"{where}: field {location!r} is missing"
    if item["type"] == "string_pattern_mismatch" and item["ctx"]["pattern"] == NAME:
        return f"{where}: {location} is {shown(item['input'])}: {NAME_RULE}"
    return f"{where}: field {location!r} = {shown(item['input'])}: {item['msg']}"


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models:
            break
        model = models[0]
    return list(model.model_fields)

"""Recipes: YAML files checked by pydantic, every unknown name refused with the nearest valid one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

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
from pydantic.fields import FieldInfo

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


def load_recipe(
    source: str | Path, overrides: Sequence[str] = (), note: Callable[[str], object] = lambda line: None
) -> Recipe:
    """Read a recipe by name (train/recipes/NAME.yaml) or by path, apply `key=value` overrides, validate all of it.

    `note` is called with a line for each stage that keeps its own value of a default that an override sets. Raises
    RecipeError naming the field, the value and the nearest valid name.
    """
    path = find_recipe(source)
    raw = parse_yaml(read_text(path), str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with `name` and `stages`, found {type(raw).__name__}")
    if not isinstance(raw.get("stages") or {}, dict):
        raise RecipeError(f"{path}: `stages` is a mapping of names to settings, found {type(raw['stages']).__name__}")
    given = [_override(raw, item) for item in overrides]
    for place in given:
        _switch_variant(raw, place, given)
    recipe = parse_recipe(raw, str(path))
    for line in _kept(raw, given):
        note(line)
    return recipe


def parse_recipe(raw: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data; each stage is parsed by its own Config class."""
    recipe = validate(Recipe, raw, where)
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
        stage = stage_class(kind, f"{where}: stages.{name}")
        config = stage.Config
        known |= set(config.model_fields)
        shared = {key: value for key, value in recipe.defaults.items() if key in config.model_fields}
        used |= set(shared)
        if not stage.has_loss():
            shared.pop("steps", None)  # of stages that train
        stages[name] = validate(config, {**shared, **fields}, f"{where}: stages.{name}")
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


def read_text(path: Path) -> str:
    """The text of a recipe's file; RecipeError where it is too long for one or not UTF-8."""
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


def _override(raw: dict[str, Any], item: str) -> tuple[str, ...]:
    """Apply `a.b.c=value` in place and return the path that it set; the value is YAML.

    A first part that names a stage means that stage; one that names a field of stages means `defaults`.
    """
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {item!r} is not key=value")
    parts = _place(raw, key.split("."), item)
    node = raw
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[parts[-1]] = parse_yaml(text, f"override {item!r}") if text else ""
    return tuple(parts)


def _place(raw: dict[str, Any], parts: list[str], item: str) -> list[str]:
    """The path in the recipe that an override's key means."""
    stages, first = raw.get("stages") or {}, parts[0]
    if first == "stages" and len(parts) > 1 and parts[1] not in stages:
        raise RecipeError(f"override {item!r}: no stage {parts[1]!r}{nearest(parts[1], stages)}")
    if first in Recipe.model_fields:
        return parts
    if first in stages:
        return ["stages", *parts]
    shared = {field for config in _configs(raw).values() for field in config.model_fields} | set(
        _mapping(raw, "defaults")
    )
    if first in shared - {"kind"}:
        return ["defaults", *parts]
    valid = {*Recipe.model_fields, *stages, *shared} - {"kind"}
    raise RecipeError(
        f"override {item!r}: {first!r} is neither a recipe field nor a stage nor a field of stages"
        f"{nearest(first, valid)}"
    )


def _configs(raw: Mapping[str, Any]) -> dict[str, type[StageConfig]]:
    """Config class of each stage of a recipe not yet validated; a stage without a known kind is left out."""
    kinds = {name: _mapping(raw["stages"], name).get("kind", name) for name in _mapping(raw, "stages")}
    return {name: stage_class(kind).Config for name, kind in kinds.items() if isinstance(kind, str) and kind in STAGES}


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _switch_variant(raw: dict[str, Any], place: tuple[str, ...], given: Sequence[tuple[str, ...]]) -> None:
    """Where an override chose another variant of a section (such as data.type), drop what only the old one has.

    Fields that overrides set themselves stay: one that does not fit is an error like any other.
    """
    *path, name = place
    section, discriminator, variants = _section(raw, path)
    chosen = section.get(name)
    if name != discriminator or not isinstance(chosen, str) or chosen not in variants:
        return  # an unknown variant is refused when the recipe is validated
    own = {other[len(path)] for other in given if list(other[: len(path)]) == path and len(other) > len(path)}
    for field in set(section) - set(variants[chosen].model_fields) - own:
        del section[field]


def _section(raw: dict[str, Any], path: list[str]) -> tuple[dict[str, Any], str, dict[str, type[BaseModel]]]:
    """The mapping at a path inside a stage or `defaults`, with the discriminator and variants that it may be."""
    configs, depth = _configs(raw), 2 if path[:1] == ["stages"] else 1
    models: Sequence[type[BaseModel]] = [configs[path[1]]] if depth == 2 and path[1:] and path[1] in configs else []
    if path[:1] == ["defaults"]:
        models = [config for config in configs.values() if path[1:] and path[1] in config.model_fields][:1]
    node: Any = raw
    for part in path[:depth]:
        node = _mapping(node, part)
    discriminator, variants = "", dict[str, type[BaseModel]]()
    for part in path[depth:]:
        if not models or part not in models[0].model_fields:
            return {}, "", {}
        discriminator, variants = _variants(models[0].model_fields[part])
        node = _mapping(node, part)
        models = [variants[tag] for tag in (str(node.get(discriminator, "")), *variants) if tag in variants]
    return node, discriminator, variants


def _variants(field: FieldInfo) -> tuple[str, dict[str, type[BaseModel]]]:
    """The field that tells the variants of a section apart ("" = there is one only), and each variant by its value."""
    annotations, discriminator = [field.annotation], field.discriminator
    models: list[type[BaseModel]] = []
    while annotations:
        annotation = annotations.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            models.append(annotation)
        elif isinstance(annotation, FieldInfo):
            discriminator = annotation.discriminator or discriminator
        else:
            annotations += get_args(annotation)
    if not isinstance(discriminator, str):
        return "", dict(zip([""], models, strict=False))
    return discriminator, {
        tag: model for model in models for tag in get_args(model.model_fields[discriminator].annotation)
    }


def _kept(raw: dict[str, Any], given: Sequence[tuple[str, ...]]) -> list[str]:
    """A line for each stage that has its own value of a default which an override sets."""
    lines = []
    for field in dict.fromkeys(path[1] for path in given if path[0] == "defaults" and len(path) > 1):
        for name, config in _configs(raw).items():
            stage = _mapping(raw["stages"], name)
            if field in config.model_fields and field in stage and ("stages", name, field) not in given:
                value = shown(stage[field])
                lines.append(
                    f"{field}: stage {name} keeps its own value {value} (override {name}.{field} to change it)"
                )
    return lines


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML stands for, of bounded size; RecipeError, which begins with `where`, for anything else."""
    try:
        return _unshared(yaml.safe_load(text), where)
    except RecursionError:
        raise RecipeError(f"{where}: not YAML of at most {MAX_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # PyYAML's own stumbles among them
        raise error if isinstance(error, RecipeError) else RecipeError(f"{where}: not YAML ({error})") from None


def validate(model: type[Strict], fields: dict[str, Any], where: str) -> Any:
    """A section from plain data; RecipeError with a line for each field that is unknown, missing or wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(model, item, where) for item in error.errors())) from None


def _explain(model: type[BaseModel], item: Any, where: str) -> str:
    parts, fields = _walk(model, item["loc"])
    location = ".".join(parts)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown field {location!r} (value {item['input']!r}){nearest(parts[-1], fields)}"
    if item["type"] == "missing":
        return f"{where}: field {location!r} is missing"
    if item["type"] == "string_pattern_mismatch" and item["ctx"]["pattern"] == NAME:
        return f"{where}: {location} is {shown(item['input'])}: {NAME_RULE}"
    return f"{where}: field {location!r} = {shown(item['input'])}: {item['msg']}"


def _walk(model: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """An error's place as a recipe writes it (pydantic also names the variant of a section), and the fields there."""
    parts: list[str] = []
    variants: dict[str, type[BaseModel]] = {}
    for number, part in enumerate(location):
        if part in variants and "" not in variants:
            model, variants = variants[str(part)], {}
            continue
        parts.append(str(part))
        if number + 1 < len(location):
            field = model.model_fields.get(str(part))
            variants = _variants(field)[1] if field else {}
            model = variants.get("", model)
    return parts, list(model.model_fields)

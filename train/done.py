"""done.json, the record of a finished stage, and whether it still holds: settings, files read, runs of input stages."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dcgen.fields import Check, check_fields, mapping, text
from dcgen.files import naming
from train import distributed
from train.checkpoint import differences
from train.config import Recipe, RecipeError, stage_class
from train.distributed import Ranks
from train.files import digest_json, read_json
from train.inputs import Digests, Record, changes, check_record, identity, missing, without_places
from train.stages.base import Context, Stage, stage_of

WATCH_FIELDS = {"checkpoint_every", "keep_checkpoints", "log_every", "preview_every", "preview_base", "shard"}
WATCH_FIELDS |= {"architecture", "compile", "compile_backend", "offload_blocks", "offload_activations"}
WATCH_FIELDS |= {"validation_every"}
DONE_FIELDS: dict[str, Check] = {"config_hash": text(100), "settings": mapping, "numbers": mapping}
NEW_FIELDS: dict[str, Check] = {"run": text(100)}  # that runs of before lack
# What a finished stage may be given anew without being trained anew.
REFINISH = {"preview_prompts", "preview_guidance", "preview_steps", "preview_seed"}
OLDER = "made by a version that did not record what it read: not compared with what is there now"


def make_stage(recipe: Recipe, name: str, ranks: Ranks) -> Stage:
    """The stage of that name, not yet set up."""
    config = recipe.stages[name]
    context = Context(recipe, name, recipe.folder / name, ranks.device, ranks.rank, ranks.world)
    return stage_class(config.kind)(config, context)


def new_record(recipe: Recipe, stage: Stage, numbers: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is written into done.json; `run` is another one whenever the stage was run again."""
    name = stage.context.name
    return {
        "config_hash": config_hash(recipe, name),
        "settings": settings_of(recipe, name),
        "run": secrets.token_hex(8),
        "inputs": stage.inputs,
        "seconds": round(seconds, 3),
        "numbers": numbers,
    }


def config_hash(recipe: Recipe, name: str) -> str:
    """Digest of everything that decides a stage's result: its settings, the seed, and its input stages' digests."""
    return _digest(recipe, name, settings_of(recipe, name))


def _digest(recipe: Recipe, name: str, settings: dict[str, Any]) -> str:
    return digest_json([settings, {ref: config_hash(recipe, ref) for ref in inputs(recipe, name)}])


def settings_of(recipe: Recipe, name: str) -> dict[str, Any]:
    """The settings of a stage that decide its result."""
    return {**recipe.stages[name].settings(without=WATCH_FIELDS), "seed": recipe.seed}


def inputs(recipe: Recipe, name: str) -> list[str]:
    """Earlier stages that a stage's config refers to by name."""
    order = list(recipe.stages)
    earlier = order[: order.index(name)]
    flat = _leaves({key: value for key, value in recipe.stages[name].model_dump().items() if key != "kind"})
    named = {stage_of(item, recipe) for item in flat if isinstance(item, str)}
    return [stage for stage in earlier if stage in named]


def _leaves(value: Any) -> list[Any]:
    """Every value in nested mappings and lists."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def take_inputs(recipe: Recipe, stage: Stage, ranks: Ranks) -> Record:
    """The record of what a stage reads, as it is now. The first rank reads, the others are told."""
    record: Record | None = None
    if ranks.first:
        digests = Digests(recipe.folder)
        reads = identity(stage.reads(), digests)
        digests.save()
        runs = {ref: (_done(recipe, ref) or {}).get("run") for ref in inputs(recipe, stage.context.name)}
        record = {"reads": reads, "stages": {ref: run for ref, run in runs.items() if run}}
    return distributed.from_first(record, ranks)


def finished(recipe: Recipe, stage: Stage, ranks: Ranks) -> tuple[dict[str, Any] | None, str]:
    """(the record of a stage that is done with these very settings and inputs, a remark on it).

    None when it is to be run, or when training goes on or only finish() runs again. RecipeError says what has changed
    since, and which commands make it anew.
    """
    name = stage.context.name
    done = _done(recipe, name)
    if done is None:
        return None, ""
    if "inputs" not in done:
        return (done if _same_as_before(recipe, stage, done) else None), OLDER
    now = take_inputs(recipe, stage, ranks)
    settings, places = settings_of(recipe, name), set(done["inputs"]["reads"]) & set(now["reads"])
    pair = without_places(done["settings"], places), without_places(settings, places)
    changed, made_anew = differences(*pair, set()), dict(_changed_stages(recipe, name))
    lines = [*made_anew.values(), *changes(done["inputs"], now)]
    if not changed and not lines:
        gone = missing(done["inputs"], now)
        return done, f"{', '.join(gone)} is not there any more: not compared" if gone else ""
    free = {"steps", *REFINISH, *stage.free_fields}
    more = settings["steps"] >= done["settings"].get("steps", 0)
    if more and not differences(*pair, free) and not made_anew and not changes(done["inputs"], now, stage.free_reads):
        return None, ""
    if changed:
        raise RecipeError(_other_settings(stage, "; ".join([*changed, *lines])))
    raise RecipeError(
        f"stage {name} in {stage.folder} was finished with other inputs ({'; '.join(lines)}); restore them, or run the "
        f"same command {redo(recipe, {name, *made_anew})}, or name another output="
    )


def redo(recipe: Recipe, first: Collection[str]) -> str:
    """The options that make these stages anew, and then those that were made of them."""
    stages: list[str] = []
    for name in recipe.stages:
        done = (recipe.folder / name / "done.json").is_file()
        if name in first or (done and set(inputs(recipe, name)) & set(stages)):
            stages.append(name)
    return ", then ".join(f"with --stage {stage} --redo" for stage in stages)


def older_ancestors(recipe: Recipe, name: str) -> list[str]:
    """What --stage `name` is told about: stages that it is made of which were made of what has been made anew since."""
    lines = []
    for ref in _ancestors(recipe, name):
        for stage, run in (_done(recipe, ref) or {}).get("inputs", {}).get("stages", {}).items():
            now = (_done(recipe, stage) or {}).get("run") if stage in recipe.stages else None
            if now and now != run:
                lines.append(f"stage {ref}, which this is made of, is stale: stage {stage} was made anew after it")
    return lines


def _changed_stages(recipe: Recipe, name: str) -> Iterator[tuple[str, str]]:
    """Input stages, near and far, which are done with other settings than the recipe's; and a message of each."""
    for ref in _ancestors(recipe, name):
        done, settings = _done(recipe, ref), settings_of(recipe, ref)
        if done is None or done["settings"] == settings:
            continue
        stage = make_stage(recipe, ref, Ranks(0, 1, distributed.CPU))
        places = set(done["inputs"]["reads"]) & set(stage.reads()) if "inputs" in done else set()
        changed = differences(without_places(done["settings"], places), without_places(settings, places), set())
        if changed:
            yield ref, f"one of its inputs (stage {ref}: {'; '.join(changed)}) was made anew or has to be"


def _ancestors(recipe: Recipe, name: str) -> list[str]:
    """The stages that a stage is made of, near and far, in the recipe's order."""
    needed = set(inputs(recipe, name))
    for other in reversed(recipe.stages):
        if other in needed:
            needed.update(inputs(recipe, other))
    return [other for other in recipe.stages if other in needed]


def _same_as_before(recipe: Recipe, stage: Stage, done: dict[str, Any]) -> bool:
    """As finished(), of a record that knows settings only."""
    name, settings = stage.context.name, settings_of(recipe, stage.context.name)
    if done["config_hash"] == config_hash(recipe, name):
        return True
    changed = differences(done["settings"], settings, set())
    same_inputs = done["config_hash"] == _digest(recipe, name, done["settings"])
    more = settings["steps"] >= done["settings"].get("steps", 0)
    if same_inputs and more and not differences(done["settings"], settings, {"steps", *REFINISH, *stage.free_fields}):
        return False  # training goes on from its last checkpoint, or only finish() runs again
    reason = "; ".join(changed) or f"one of its inputs {inputs(recipe, name)} was made anew"
    raise RecipeError(_other_settings(stage, reason))


def _other_settings(stage: Stage, reason: str) -> str:
    return (
        f"stage {stage.context.name} in {stage.folder} was finished with other settings ({reason}); "
        f"restore them, use --redo (with --stage {stage.context.name}), or another output="
    )


def _done(recipe: Recipe, name: str) -> dict[str, Any] | None:
    """The checked record of a stage; None while it is not done."""
    path: Path = recipe.folder / name / "done.json"
    if not path.exists():
        return None
    done = read_json(path)
    if "fingerprint" in done:  # what config_hash was called
        done.setdefault("config_hash", done["fingerprint"])
    with naming(path):
        check_fields(done, DONE_FIELDS | NEW_FIELDS, needed=tuple(DONE_FIELDS))
        if "inputs" in done:
            check_record(done["inputs"])
    return done

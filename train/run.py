"""`python -m train.run RECIPE [--stage NAME] [--dry-run] [key=value ...]` and `python -m train.run --list`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen.fields import Check, check_fields, mapping, text
from dcgen.files import naming
from train import distributed
from train.cache import CacheError
from train.checkpoint import CheckpointError, differences
from train.config import Recipe, RecipeError, find_recipe, list_recipes, load_recipe, nearest, stage_class
from train.distributed import Ranks
from train.files import digest_json, mark, read_json, remove_marked, write_json
from train.lock import InUse, locked, sweep
from train.loop import NonFinite, Stopped, train_stage
from train.report import write_report
from train.stages.base import Context, Stage, stage_of

FULL_DISK = "; what was finished before is intact: free disk space and run the same command"
WATCH_FIELDS = {"checkpoint_every", "keep_checkpoints", "log_every", "preview_every", "shard", "architecture"}
DONE_FIELDS: dict[str, Check] = {"config_hash": text(100), "settings": mapping, "numbers": mapping}
# What a finished stage may be given anew without being trained anew.
REFINISH = {"preview_prompts", "preview_guidance", "preview_steps", "preview_seed"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code (see `exit_code`)."""
    options = _parser().parse_intermixed_args(arguments)
    options.command = ["-m", "train.run", *(sys.argv[1:] if arguments is None else arguments)]
    if options.list:
        print(_listing())
        return 0
    if not options.recipe:
        print("name a recipe, or use --list", file=sys.stderr)
        return 1
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    first = os.environ.get("RANK", "0") == "0"
    recipe = load_recipe(options.recipe, options.overrides, note=print if first else lambda line: None)
    if options.dry_run:
        return dry_run(recipe, only=options.stage)
    run_recipe(recipe, only=options.stage, redo=options.redo, command=options.command)
    return 0


def exit_code(work: Callable[[], int]) -> int:
    """Do the work and return its exit code: 1 with a line instead of a traceback where it is refused or fails in a
    known way, 128 + N where signal N stopped it (130 for Ctrl-C, 143 for SIGTERM).
    """
    try:
        return work()
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on: finished stages, shards and checkpoints are kept", file=sys.stderr)
        return 128 + signal.SIGINT
    except (RecipeError, CheckpointError, CacheError, InUse, NonFinite, OSError, ValueError) as error:
        hint = FULL_DISK if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        print(f"\nerror: {error}{hint}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()


def run_recipe(
    recipe: Recipe, only: str | None = None, redo: bool = False, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the stages that are not done yet (or just `only`); returns each stage's numbers.

    command: arguments of the interpreter that started this, for the report.
    """
    names = chosen(recipe, only)
    ranks = distributed.start(recipe.device)
    with locked(recipe.folder) if ranks.first else contextlib.nullcontext():
        if ranks.first:
            write_json(recipe.folder / "recipe.json", _plain(recipe))
            if command:
                start = ["python"] if ranks.world == 1 else ["torchrun", "--nproc_per_node", str(ranks.world)]
                write_json(recipe.folder / "run.json", {"command": [*start, *command], "versions": _versions()})
            sweep(recipe.folder / name for name in recipe.stages)
        return _run_stages(recipe, names, redo, ranks)


def chosen(recipe: Recipe, only: str | None) -> list[str]:
    """Names of the stages to run or plan: all, or just `only`; RecipeError with the nearest name for an unknown one."""
    if only is not None and only not in recipe.stages:
        raise RecipeError(f"recipe {recipe.name} has no stage {only!r}{nearest(only, recipe.stages)}")
    return list(recipe.stages) if only is None else [only]


def _run_stages(recipe: Recipe, names: list[str], redo: bool, ranks: Ranks) -> dict[str, Any]:
    results = {}
    for name in names:
        stage = make_stage(recipe, name, ranks)
        done = _finished(recipe, stage, redo and ranks.first)
        if done is None:
            done = run_stage(recipe, stage, ranks)
        elif ranks.first:
            print(f"{name}: done before, in {stage.folder}")
        results[name] = done["numbers"]
    if ranks.first:
        write_report(recipe.folder)
    return results


def make_stage(recipe: Recipe, name: str, ranks: Ranks) -> Stage:
    """The stage of that name, not yet set up."""
    config = recipe.stages[name]
    context = Context(recipe, name, recipe.folder / name, ranks.device, ranks.rank, ranks.world)
    return stage_class(config.kind)(config, context)


def run_stage(recipe: Recipe, stage: Stage, ranks: Ranks) -> dict[str, Any]:
    """Check, set up, train if it trains, finish, and note it as done."""
    name = stage.context.name
    missing = [other for other in inputs(recipe, name) if stage.context.pending(other)]
    problems = [f"stage {other} comes first and is not done (--stage {other})" for other in missing] or stage.check()
    if problems:
        raise RecipeError(f"stage {stage.context.name} cannot run:\n  " + "\n  ".join(problems))
    begin = time.perf_counter()
    if ranks.first:
        mark(stage.folder)
    module = stage.setup()
    weights = {} if module is None else train_stage(stage, module, ranks, recipe.seed)
    numbers = stage.finish(weights)
    done = {
        "config_hash": config_hash(recipe, stage.context.name),
        "settings": _settings(recipe, stage.context.name),
        "seconds": round(time.perf_counter() - begin, 3),
        "numbers": numbers,
    }
    if ranks.first:
        write_json(stage.folder / "done.json", done)
        short = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items() if isinstance(value, int | float))
        print(f"{stage.context.name}: done in {done['seconds']:.1f} s" + (f" ({short})" if short else ""), flush=True)
    distributed.barrier()
    return done


def dry_run(recipe: Recipe, only: str | None = None) -> int:
    """Print the plan (of just the stage `only`) without loading weights; exit code 1 when a setting cannot work.

    Folders which are not there yet are listed, not refused: a plan is made before the download.
    """
    names = chosen(recipe, only)
    print(
        f"{recipe.name}: {recipe.about}\n  output {recipe.folder}, seed {recipe.seed}, planned for {recipe.ranks} ranks"
    )
    failed = False
    for name in names:
        config = recipe.stages[name]
        stage = make_stage(recipe, name, Ranks(0, 1, torch.device("cpu")))
        state = "done" if (stage.folder / "done.json").exists() else "to do"
        steps = f": {config.steps} steps of {config.batch}, AdamW lr {config.optimizer.lr:g}" if stage.trains else ""
        print(f"{name} ({config.kind}, {state}){steps}")
        for line in stage.describe_plan():
            print(f"  {line}")
        for problem in stage.check():
            print(f"  needed before it runs: {problem}")
        for problem in stage.check_plan():
            failed = True
            print(f"  refused: {problem}")
    return int(failed)


def config_hash(recipe: Recipe, name: str) -> str:
    """Digest of everything that decides a stage's result: its settings, the seed, and its input stages' digests."""
    return _digest(recipe, name, _settings(recipe, name))


def _digest(recipe: Recipe, name: str, settings: dict[str, Any]) -> str:
    return digest_json([settings, {ref: config_hash(recipe, ref) for ref in inputs(recipe, name)}])


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


def _finished(recipe: Recipe, stage: Stage, redo: bool) -> dict[str, Any] | None:
    """The record of a stage that is done with these very settings; None when it is to be run (again)."""
    name, path = stage.context.name, stage.folder / "done.json"
    if redo:
        remove_marked(stage.folder, recipe.folder)
    distributed.barrier()
    if not path.exists():
        return None
    done = read_json(path)
    if "fingerprint" in done:  # what config_hash was called
        done.setdefault("config_hash", done["fingerprint"])
    with naming(path):
        check_fields(done, DONE_FIELDS, needed=tuple(DONE_FIELDS))
    settings = _settings(recipe, name)
    if done["config_hash"] == config_hash(recipe, name):
        return done
    changed = differences(done["settings"], settings, set())
    same_inputs = done["config_hash"] == _digest(recipe, name, done["settings"])
    more = settings["steps"] >= done["settings"].get("steps", 0)
    if same_inputs and more and not differences(done["settings"], settings, {"steps", *REFINISH, *stage.free_fields}):
        return None  # training goes on from its last checkpoint, or only finish() runs again
    reason = "; ".join(changed) or f"one of its inputs {inputs(recipe, name)} was made anew"
    raise RecipeError(
        f"stage {name} in {stage.folder} was finished with other settings ({reason}); "
        f"restore them, use --redo (with --stage {name}), or another output="
    )


def _settings(recipe: Recipe, name: str) -> dict[str, Any]:
    return {**recipe.stages[name].settings(without=WATCH_FIELDS), "seed": recipe.seed}


def _plain(recipe: Recipe) -> dict[str, Any]:
    stages = {name: config.model_dump(mode="json") for name, config in recipe.stages.items()}
    return {**json.loads(recipe.model_dump_json(exclude={"stages"})), "stages": stages}


def _versions() -> dict[str, str]:
    """Versions of the interpreter and of the packages that decide a result."""
    packages = ("torch", "diffusers", "transformers", "peft", "safetensors")
    found = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    return {"python": platform.python_version(), **found}


def _listing() -> str:
    lines = []
    for name in list_recipes():
        recipe = load_recipe(Path(find_recipe(name)))
        lines.append(f"{name:16} {recipe.about}\n{'':16} stages: {', '.join(recipe.stages)}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.run", description="Run a training recipe; what is done is skipped."
    )
    parser.add_argument("recipe", nargs="?", help="a name in train/recipes, or a path to a .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seed=1 or finetune.steps=100")
    parser.add_argument("--stage", help="run this stage only")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, load nothing")
    parser.add_argument("--redo", action="store_true", help="drop what the stages to be run left before")
    parser.add_argument("--list", action="store_true", help="show the recipes")
    return parser


if __name__ == "__main__":
    sys.exit(main())

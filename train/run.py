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

if not __package__:
    sys.exit("error: start this as a module, in the repository's folder: python -m train.run RECIPE")

import torch

from train import distributed
from train.cache import CacheError
from train.checkpoint import CheckpointError
from train.config import Recipe, RecipeError, find_recipe, list_recipes, load_recipe, nearest
from train.disk import check_space
from train.distributed import Ranks
from train.done import config_hash, finished, inputs, make_stage, new_record, older_ancestors, take_inputs
from train.files import mark, remove_marked, write_json
from train.inputs import STORE
from train.lock import InUse, locked, sweep, sweep_files
from train.loop import NonFinite, Stopped, train_stage
from train.optimizer import check_optimizers
from train.report import write_report
from train.stages.base import Stage
from train.trackers import check_trackers

FULL_DISK = "; what was finished before is intact: free disk space and run the same command"
ROOM = "free disk space, or name an output= on a larger disk"
__all__ = ["config_hash", "dry_run", "exit_code", "inputs", "main", "make_stage", "run_recipe", "run_stage"]


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
    check_trackers(recipe)
    check_optimizers(recipe)
    ranks = distributed.start(recipe.device)
    with locked(recipe.folder) if ranks.first else contextlib.nullcontext():
        if ranks.first:
            write_json(recipe.folder / "recipe.json", _plain(recipe))
            if command:
                start = ["python"] if ranks.world == 1 else ["torchrun", "--nproc_per_node", str(ranks.world)]
                write_json(recipe.folder / "run.json", {"command": [*start, *command], "versions": _versions()})
            sweep(recipe.folder / name for name in recipe.stages)
            sweep_files(recipe.folder, ("recipe.json", "report.html", "run.json", STORE))
        return _run_stages(recipe, names, redo, ranks)


def chosen(recipe: Recipe, only: str | None) -> list[str]:
    """Names of the stages to run or plan: all, or just `only`; RecipeError with the nearest name for an unknown one."""
    if only is not None and only not in recipe.stages:
        raise RecipeError(f"recipe {recipe.name} has no stage {only!r}{nearest(only, recipe.stages)}")
    return list(recipe.stages) if only is None else [only]


def _run_stages(recipe: Recipe, names: list[str], redo: bool, ranks: Ranks) -> dict[str, Any]:
    results = {}
    stages = [make_stage(recipe, name, ranks) for name in names]
    if not redo:  # what is stale among all of them is said before any of them runs
        for stage in stages:
            finished(recipe, stage, ranks)
    for stage in stages:
        name = stage.context.name
        if redo and ranks.first:
            remove_marked(stage.folder, recipe.folder)
        distributed.barrier()
        if len(names) == 1 and ranks.first:
            for line in older_ancestors(recipe, name):
                print(f"{name}: {line}", flush=True)
        done, remark = finished(recipe, stage, ranks)
        if done is None:
            done = run_stage(recipe, stage, ranks)
        elif ranks.first:
            print(f"{name}: done before, in {stage.folder}" + (f" ({remark})" if remark else ""), flush=True)
        results[name] = done["numbers"]
    if ranks.first:
        write_report(recipe.folder)
    return results


def run_stage(recipe: Recipe, stage: Stage, ranks: Ranks) -> dict[str, Any]:
    """Check, set up, train if it trains, finish, and note it as done."""
    name = stage.context.name
    missing = [other for other in inputs(recipe, name) if stage.context.pending(other)]
    problems = [f"stage {other} comes first and is not done (--stage {other})" for other in missing] or stage.check()
    if problems:
        raise RecipeError(f"stage {stage.context.name} cannot run:\n  " + "\n  ".join(problems))
    begin = time.perf_counter()
    stage.inputs = take_inputs(recipe, stage, ranks)
    stage.later_bytes = _later_bytes(recipe, name)
    if ranks.first:
        check_space(stage.folder, {"the result": stage.result_bytes(0), "later stages": stage.later_bytes}, ROOM)
        mark(stage.folder)
    module = stage.setup()
    weights = {} if module is None else train_stage(stage, module, ranks, recipe.seed)
    numbers = stage.finish(weights)
    done = new_record(recipe, stage, numbers, time.perf_counter() - begin)
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


def _later_bytes(recipe: Recipe, name: str) -> int:
    """Bytes that the stages after this one will write of which it is an input, as far as can be told now."""
    of_this = [other for other in recipe.stages if name in inputs(recipe, other)]
    to_do = [other for other in of_this if not (recipe.folder / other / "done.json").is_file()]
    return sum(make_stage(recipe, other, Ranks(0, 1, distributed.CPU)).result_bytes(0) for other in to_do)


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

"""Checkpoints of a stage: trained weights, AdamW moments, EMA and one integer. Safetensors and JSON, no pickle.

Tensors are stored whole, so a run may go on with another number of ranks. torch.distributed.checkpoint is not used:
its metadata file is a pickle.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcgen import fields
from dcgen.files import sync_folder
from train.distributed import Ranks, barrier, fill, whole
from train.files import read_json, write_folder, write_json, write_tensors
from train.inputs import Record, changes, check_record, without_places
from train.optimizer import empty_slot, stored_moments, targets

FORMAT = 1
RECORD_FIELDS: dict[str, fields.Check] = {
    "step": fields.whole(0, 1 << 40),
    "adam_steps": fields.mapping,
    "settings": fields.mapping,
    "unlogged": fields.mapping,
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


class Unreadable(CheckpointError):
    """A checkpoint that is damaged, so that one before it may be taken."""


@dataclass
class TrainState:
    """What must survive a kill: named parameters, their optimizer and their moving average."""

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None


def save(
    folder: Path,
    step: int,
    state: TrainState,
    settings: dict[str, Any],
    ranks: Ranks,
    keep: int,
    unlogged: dict[str, list[float]] | None = None,
    inputs: Record | None = None,
) -> None:
    """Write `folder/step-XXXXXXXX` whole or not at all, then drop all but the newest `keep`.

    unlogged: the numbers of the steps since the last row of the log, which the next row is to tell of, too.
    inputs: the record of what the stage reads, see train.inputs.
    """
    moments: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for name, parameter in state.parameters.items():
        slot = state.optimizer.state.get(parameter)
        if slot:
            steps[name] = int(slot["step"].item())
            moments |= stored_moments(name, slot)
    tensors = {"weights": full_weights(state.parameters), "optimizer": moments}
    if state.ema is not None:
        tensors["ema"] = full_weights(state.ema)

    def write(temporary: Path) -> None:
        for file, content in tensors.items():
            write_tensors(temporary / f"{file}.safetensors", content)
        record = {"format": FORMAT, "step": step, "adam_steps": steps, "settings": settings}
        record["unlogged"] = unlogged or {}
        if inputs is not None:
            record["inputs"] = inputs
        write_json(temporary / "state.json", record)

    if ranks.first:
        write_folder(folder / f"step-{step:08d}", write)
        for old in _list(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()


def load(
    folder: Path,
    state: TrainState,
    settings: dict[str, Any],
    free: set[str],
    move: bool = True,
    inputs: Record | None = None,
    free_reads: Collection[str] = (),
) -> int:
    """Restore the newest checkpoint that can be read into `state`; returns its step, 0 when there is none.

    A damaged one is reported and, with `move`, renamed, so that it counts no longer; CheckpointError when all are so,
    and when settings or inputs have changed that decide the weights (not those which are `free`).
    """
    damaged: list[Path] = []
    for path in reversed(_list(folder)):
        try:
            step = _load(path, state, settings, free, inputs, free_reads)
        except Unreadable as error:
            print(f"{error}; going on from the one before, if there is one", file=sys.stderr, flush=True)
            damaged.append(path)
            continue
        for other in damaged if move else []:
            aside = other.with_name(f"damaged-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            sync_folder(folder)
        return step
    if damaged:
        raise CheckpointError(
            f"{', '.join(map(str, damaged))}: no checkpoint can be read; remove the folder {folder} to start anew"
        )
    return 0


def unlogged(folder: Path, step: int) -> dict[str, list[float]]:
    """What save() was given under that name at this step; nothing where there is no such checkpoint."""
    path = folder / f"step-{step:08d}" / "state.json"
    return read_json(path).get("unlogged", {}) if path.is_file() else {}


def _load(
    path: Path,
    state: TrainState,
    settings: dict[str, Any],
    free: set[str],
    inputs: Record | None,
    free_reads: Collection[str],
) -> int:
    try:
        record = read_json(path / "state.json")
        fields.check_fields(record, RECORD_FIELDS, needed=("format",))
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} is unreadable ({error})") from error
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {record['format']}, this program reads {FORMAT}; remove that folder")
    try:
        fields.check_fields(record, {}, needed=("step", "adam_steps", "settings"))
        if "inputs" in record:
            check_record(record["inputs"])
    except ValueError as error:
        raise Unreadable(f"{path} is unreadable ({error})") from error
    old = record.get("inputs")
    places = set(old["reads"]) & set(inputs["reads"]) if old is not None and inputs is not None else set()
    changed = differences(without_places(record["settings"], places), without_places(settings, places), free)
    if changed:
        raise CheckpointError(
            f"{path} was made with other settings ({'; '.join(changed)}); "
            f"restore them, or remove the folder {path.parent} to start anew"
        )
    read = changes(old, inputs, free_reads) if old is not None and inputs is not None else []
    if read:
        raise CheckpointError(
            f"{path} was trained on other inputs ({'; '.join(read)}); restore them, or start anew: run the same "
            f"command with --stage {path.parent.parent.name} --redo, or remove the folder {path.parent}"
        )
    if old is None and inputs is not None and inputs["reads"]:
        print(f"{path}: made by a version that did not record what it read; not compared", file=sys.stderr, flush=True)
    parameters = {name: parameter.data for name, parameter in state.parameters.items()}
    _read(path / "weights.safetensors", parameters)
    moments: dict[str, Tensor] = {}
    for name, parameter in state.parameters.items():
        if name not in record["adam_steps"]:
            continue
        slot = empty_slot(state.optimizer, parameter, float(record["adam_steps"][name]))
        state.optimizer.state[parameter] = slot
        moments |= targets(name, slot)
    _read(path / "optimizer.safetensors", moments)
    if state.ema is not None:
        _read(path / "ema.safetensors", state.ema)
    return int(record["step"])


def full_weights(named: dict[str, Any]) -> dict[str, Tensor]:
    """Whole CPU tensors by name (every rank must call it)."""
    return {
        name: whole(tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor) for name, tensor in named.items()
    }


def differences(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> list[str]:
    """'field: old -> new' for every top-level field that differs and is not free to change."""
    keys = sorted((set(old) | set(new)) - free)
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _list(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


@torch.no_grad()
def _read(path: Path, targets: dict[str, Tensor]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            if stored != set(targets):
                missing, unknown = sorted(set(targets) - stored), sorted(stored - set(targets))
                raise CheckpointError(f"{path} does not fit this model: missing {missing[:5]}, unknown {unknown[:5]}")
            for name, target in targets.items():
                value = file.get_tensor(name)
                if value.shape != target.shape:
                    raise CheckpointError(
                        f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}"
                    )
                fill(target, value)
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"{path} is unreadable ({error})") from error

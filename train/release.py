"""Release folders: a moved model's text side, autoencoder and scheduler, around its network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dcgen.adapter import Adapter
from dcgen.convert import unpack
from dcgen.folder import SCHEDULER, TRANSFORMER, VAE
from dcgen.release import open_model
from dcgen.schedule import DYNAMIC, LINEAR, SCHEDULE_KEY, Schedule
from train.files import read_json, write_folder, write_json
from train.inputs import Read, tree

BESIDE = (".json", ".md", ".txt", "")  # endings of the texts of a release outside of its folders; "" is LICENSE


def write_release(out: Path, merged: Path, base: Path, autoencoder: Path, adapter: Adapter) -> Path:
    """A release folder of a merged single file: the base's text side, the new autoencoder, the adapter's schedule."""
    if out.exists():
        shutil.rmtree(out)
    parts = out.with_name(f".parts.{os.getpid()}.tmp")  # swept if this is killed
    write_folder(parts, lambda folder: release_parts(folder, base, autoencoder, adapter.latent.name, adapter.schedule))
    try:
        return unpack(open_model(merged), out, parts=parts)
    finally:
        shutil.rmtree(parts)


def release_files(base: Path, without: Collection[str] = ()) -> Read:
    """The files of a release: what model_index.json names, itself, and texts beside it (licence, model card).

    A download may hold more, such as FLUX.1's 24 GB again as one file and pictures; those are no part of a release.
    without: folders to leave out. Nothing where there is no model_index.json.
    """
    index = base / "model_index.json"
    if not index.is_file():
        return Read(base, ())
    named = [name for name, value in read_json(index).items() if isinstance(value, list) and name not in without]
    files = [file for name in named if (base / name).is_dir() for file in tree(base / name).files]
    beside = [f for f in base.iterdir() if f.suffix in BESIDE and f.name[0] != "." and f.is_file()]
    return Read(base, tuple(sorted([*files, *beside])))


def check_parts(base: Path) -> None:
    """An error that names the file of a base which release_parts would miss."""
    read_json(base / "model_index.json")
    read_json(base / SCHEDULER)


def release_parts(folder: Path, base: Path, autoencoder: Path, name: str, schedule: Schedule) -> None:
    """Fill `folder` with everything of a release but the network; `name` is the autoencoder's."""
    for file in release_files(base, without=(TRANSFORMER, VAE)).files:
        target = folder / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    shutil.copytree(autoencoder, folder / VAE)
    config = read_json(autoencoder / "config.json")
    # the folder is called vae from now on, so the name must be in the file
    write_json(folder / VAE / "config.json", {**config, "_name_or_path": name})
    index = read_json(folder / "model_index.json")
    index[VAE] = ["diffusers", config["_class_name"]]
    write_json(folder / "model_index.json", index)
    write_scheduler(folder / SCHEDULER, schedule)


def write_scheduler(path: Path, schedule: Schedule) -> None:
    """Write a schedule in full into a scheduler_config.json: for diffusers as far as it has such fields, and for us."""
    config = read_json(path)
    write_json(path, {**config, **_diffusers_fields(config, schedule), SCHEDULE_KEY: schedule.to_dict()})


def _diffusers_fields(config: dict[str, Any], schedule: Schedule) -> dict[str, Any]:
    """What a scheduler of that config is to be told. FLUX.2's rule and Sprint's two steps have no fields there."""
    if "beta_schedule" in config and "flow_shift" not in config:
        return {}  # a DDPM scheduler knows no shift
    if schedule.shift is not None or schedule.mu is not None:
        field = "flow_shift" if "flow_shift" in config else "shift"
        return {field: schedule.ratio(tokens=1, channels=1), "use_dynamic_shifting": False}
    if schedule.rule == LINEAR:
        return {"use_dynamic_shifting": True, **{name: getattr(schedule, name) for name in DYNAMIC}}
    return {}

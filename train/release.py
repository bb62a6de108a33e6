"""Release folders: a moved model's text side, autoencoder and scheduler, around its network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from dcgen.adapter import Adapter
from dcgen.convert import unpack
from dcgen.release import SCHEDULE_FIELD, open_model
from train.files import read_json, write_folder, write_json


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


def check_parts(base: Path) -> None:
    """An error that names the file of a base which release_parts would miss."""
    read_json(base / "model_index.json")
    read_json(base / "scheduler" / "scheduler_config.json")


def release_parts(folder: Path, base: Path, autoencoder: Path, name: str, schedule: dict[str, Any]) -> None:
    """Fill `folder` with everything of a release but the network; `name` is the autoencoder's."""
    for item in base.iterdir():
        if item.name not in ("transformer", "vae") and not item.name.startswith("."):
            target = folder / item.name
            if item.is_dir():
                shutil.copytree(item, target)
            else:
                shutil.copy2(item, target)
    shutil.copytree(autoencoder, folder / "vae")
    config = read_json(autoencoder / "config.json")
    # the folder is called vae from now on, so the name must be in the file
    write_json(folder / "vae" / "config.json", {**config, "_name_or_path": name})
    index = read_json(folder / "model_index.json")
    index["vae"] = ["diffusers", config["_class_name"]]
    write_json(folder / "model_index.json", index)
    _write_scheduler(folder / "scheduler" / "scheduler_config.json", schedule)


def _write_scheduler(path: Path, schedule: dict[str, Any]) -> None:
    """A static shift replaces the base's; "flux" means FLUX.1's own rule, which its config already says."""
    config = read_json(path)
    shift = schedule.get("shift")
    if "beta_schedule" in config and "flow_shift" not in config:
        return  # a DDPM scheduler (DiT) knows no shift
    if schedule["rule"] == "static" and shift is not None:
        field = "flow_shift" if "flow_shift" in config else "shift"
        config |= {field: shift, "use_dynamic_shifting": False}
    elif schedule["rule"] == "flux":
        config["use_dynamic_shifting"] = True
    # FLUX.2's rule has no field of its own there, and an f32 release on FLUX.1's would be taken for it.
    write_json(path, {**config, SCHEDULE_FIELD: schedule})

"""HTTP route for the page: the spatial factor and patch size of a model, so that a node can show its token count."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web

from ...dcgen.adapter import load_adapter
from ...dcgen.files import disk_state
from ...dcgen.latent import LatentSpace
from ...dcgen.release import open_model
from ...dcgen.spaces import SPACES
from .release import find_release, release_names

PATH = "/dcgen/latent"


def register() -> None:
    """Add the route to the running server; does nothing in scripts that load the pack without one."""
    module = sys.modules.get("server")  # main.py has imported it; importing it in a script has side effects
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if server is not None:
        server.routes.get(PATH)(_answer)


class UnknownName(ValueError):
    """ComfyUI lists no file with this kind and name."""


async def _answer(request: web.Request) -> web.Response:
    """GET ?kind=release|model|adapter&name=NAME[&autoencoder=NAME] -> {"factor": f, "patch": p, "channels": C,
    "guidance": whether the model has a guidance embedding}.

    404 when there is no such file, 422 when the file does not state it; both with a message.
    """
    query = [request.query.get(key, "") for key in ("kind", "name", "autoencoder")]
    try:
        facts = await asyncio.to_thread(describe, *query)
    except (ValueError, FileNotFoundError) as error:
        missing = isinstance(error, (UnknownName, FileNotFoundError))
        return web.json_response({"error": str(error)}, status=404 if missing else 422)
    return web.json_response(facts)


def describe(kind: str, name: str, autoencoder: str = "") -> dict[str, Any]:
    """Spatial factor, patch size and channels of a model by name. Only names that ComfyUI lists are read, never a path.

    autoencoder: the latent space to use when the model's file does not name its own.
    """
    path = _path(kind, name)
    return dict(_described(kind, path, disk_state(path), autoencoder))


def _path(kind: str, name: str) -> Path:
    if kind == "adapter" and name in folder_paths.get_filename_list("model_patches"):
        return Path(folder_paths.get_full_path_or_raise("model_patches", name))
    if kind in ("release", "model") and name in release_names():
        return find_release(name)
    if kind == "model" and name in folder_paths.get_filename_list("diffusion_models"):
        return Path(folder_paths.get_full_path_or_raise("diffusion_models", name))
    raise UnknownName(f"no {kind} of that name")


@lru_cache(maxsize=64)
def _described(kind: str, path: Path, state: str, autoencoder: str) -> dict[str, Any]:
    """The facts of a file or folder. state: changes with its content, so that an unchanged one is read once."""
    if kind == "adapter":
        adapter = load_adapter(path)
        return _facts(adapter.latent, adapter.patch_size, adapter.base)
    model = open_model(path)
    if model.latent is None and autoencoder in SPACES:
        model = model.on_latent(SPACES[autoencoder])
    if model.latent is None:
        raise ValueError(f"{path.name} does not say what its latent is")
    return _facts(model.latent, model.patch_size, model.config)


def _facts(space: LatentSpace, patch: int, config: Mapping[str, Any]) -> dict[str, Any]:
    guidance = bool(config.get("guidance_embeds"))
    return {"factor": space.spatial_factor, "patch": patch, "channels": space.channels, "guidance": guidance}

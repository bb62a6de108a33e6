"""Fixtures: a real ComfyUI, always its own interpreter in another process, and tiny models for it.

Everything that uses `comfy` or `server` runs once in each setting: every ComfyUI that settings.py finds, in each of its
modes; `-k 0.33.0-dynamic` chooses one. What does not depend on the mode is marked `once_per_core`. Without a ComfyUI
these tests skip and say so.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _helper(name: str) -> ModuleType:
    """A module of this folder (test files cannot import each other under importlib mode)."""
    full = f"comfy_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


# In this order: they import each other by these names.
settings, browsers, core, servers = map(_helper, ("settings", "browser", "core", "server"))
NONE = "no-comfyui"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that need a ComfyUI run in every setting, or once for each core."""
    if "comfy" not in metafunc.fixturenames:
        return
    try:
        found = settings.settings_of(settings.find_comfyuis(os.environ.get("COMFYUI_PATH")))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if metafunc.definition.get_closest_marker("once_per_core"):
        found = [setting for setting in found if setting.mode == "legacy"]
    names = [setting.label for setting in found]
    metafunc.parametrize("comfy", found or [None], ids=names or [NONE], indirect=True, scope="session")


@pytest.fixture(scope="session")
def comfy(request: pytest.FixtureRequest):
    """A ComfyUI in one mode, for functions of inside/*.py."""
    if request.param is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or put one in ~/ComfyUI")
    found = core.Comfy(request.param)
    yield found
    found.close()


@pytest.fixture(scope="session")
def server(comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The one server of a setting, with live previews on: the previews are part of what is tested."""
    flags = ("--preview-method", "latent2rgb", *servers.frontend_flags())
    running = servers.Server(comfy, tmp_path_factory.mktemp("comfy") / "base", flags)
    yield running
    running.close()


@pytest.fixture(scope="session")
def helper() -> ModuleType:
    """adapters.py: random adapters, LoRA files and network inputs."""
    return _helper("adapters")


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """releases.py: tiny release folders and networks."""
    return _helper("releases")


@pytest.fixture(scope="session")
def qwen() -> ModuleType:
    """qwen.py: a tiny Qwen3 and its tokenizer."""
    return _helper("qwen")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """A headless Chromium; skips where there is none."""
    program = browsers.find_chromium()
    if program is None:
        pytest.skip("no Chromium found: install chromium, or set CHROMIUM_PATH")
    page = browsers.Browser(program, tmp_path_factory.mktemp("chromium"))
    yield page
    page.close()


@pytest.fixture(scope="session")
def base_release(tmp_path_factory: pytest.TempPathFactory, tiny):
    """(folder, pipeline) of a tiny random FLUX on an f8 VAE."""
    folder = tmp_path_factory.mktemp("releases") / "tiny-flux"
    return folder, tiny.make_release(folder, seed=10)


@pytest.fixture(scope="session")
def deep_release(tmp_path_factory: pytest.TempPathFactory, tiny):
    """(folder, pipeline) of a tiny random merged DC-Gen FLUX on an f32 DC-AE, its transformer in several shards."""
    folder = tmp_path_factory.mktemp("releases") / "tiny-dcgen-flux"
    return folder, tiny.make_release(folder, deep=32, seed=20, shard="100KB")


@pytest.fixture(scope="session")
def deeper_release(tmp_path_factory: pytest.TempPathFactory, tiny):
    """(folder, pipeline) of a tiny random merged DC-Gen FLUX on an f64 DC-AE."""
    folder = tmp_path_factory.mktemp("releases") / "tiny-dcgen-flux-f64"
    return folder, tiny.make_release(folder, deep=64, seed=30)


@pytest.fixture(scope="session")
def deep_name(server, deep_release):
    """The tiny f32 DC-Gen release in the server's models/diffusers."""
    return server.install(deep_release[0], "diffusers", "tiny-dcgen")


@pytest.fixture(scope="session")
def deeper_name(server, deeper_release):
    """The tiny f64 one."""
    return server.install(deeper_release[0], "diffusers", "tiny-dcgen-f64")


@pytest.fixture(scope="session")
def base_name(server, base_release):
    """The tiny base release there."""
    return server.install(base_release[0], "diffusers", "tiny-base")


@pytest.fixture(scope="session")
def adapter_name(server, base_release, tiny):
    """A random adapter for the tiny base, whose latent is that of the tiny DC-Gen release's autoencoder."""
    file = server.base / "models" / "model_patches" / "tiny.safetensors"
    tiny.make_adapter(file, base_release[1].transformer)
    return file.name

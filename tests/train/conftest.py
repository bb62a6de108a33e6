"""A finished run of the debug recipe, shared by the tests."""

from __future__ import annotations

import multiprocessing

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processes():
    """What starts runs: a fork server that has imported all they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train.run", "train.stages.finetune", "diffusers", "diffusers.models.transformers.transformer_flux", "peft"]
    )
    return context


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory):
    """Folder of the debug recipe, run once in this session."""
    return _run("debug", tmp_path_factory)


@pytest.fixture(scope="session")
def debug_sana(tmp_path_factory):
    """The same for SANA."""
    return _run("debug-sana", tmp_path_factory)


@pytest.fixture(scope="session")
def debug_klein(tmp_path_factory):
    """The same for FLUX.2 klein, whose embedder and head have no bias."""
    return _run("debug-klein", tmp_path_factory)


@pytest.fixture(scope="session")
def debug_zimage(tmp_path_factory):
    """The same for Z-Image: ragged text, ends named by the patch size, a velocity of the opposite sign."""
    return _run("debug-zimage", tmp_path_factory)


@pytest.fixture(scope="session")
def debug_dit(tmp_path_factory):
    """The same for DiT."""
    return _run("debug-dit", tmp_path_factory)


def _run(recipe, tmp_path_factory):
    from train.config import load_recipe
    from train.run import run_recipe

    folder = tmp_path_factory.mktemp(recipe)
    run_recipe(load_recipe(recipe, [f"output={folder}"]))
    return folder

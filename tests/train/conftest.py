"""A finished run of the debug recipe, shared by the tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory):
    """Folder of the debug recipe, run once in this session."""
    from train.config import load_recipe
    from train.run import run_recipe

    folder = tmp_path_factory.mktemp("debug")
    run_recipe(load_recipe("debug", [f"output={folder}"]))
    return folder

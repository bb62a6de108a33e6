"""Pickled weights of a release rewritten as safetensors."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from train.to_safetensors import main, rewrite


def test_tensors_are_the_same_and_what_is_there_is_kept(tmp_path):
    shared = torch.randn(3, 2)
    state = {"a": shared, "tied": shared, "half": torch.randn(4, dtype=torch.float16)[::2]}
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        torch.save(state, tmp_path / part / "diffusion_pytorch_model.bin")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"kept")
    (out,) = rewrite(tmp_path)
    assert out == tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    found = load_file(out)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == b"kept"
    assert rewrite(tmp_path) == []


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "words"),
    [(Runs(), "not a file of tensors"), ({"a": 1}, "other things than tensors"), (None, "no part with weights")],
)
def test_anything_else_is_refused_without_running_it(tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "release"
    (folder / "transformer").mkdir(parents=True)
    if content is not None:
        torch.save(content, folder / "transformer" / "model.bin")
    assert main([str(folder)]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not list(folder.rglob("*.safetensors"))
